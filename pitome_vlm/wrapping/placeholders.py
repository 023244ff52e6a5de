"""The placeholders of a prompt and the images they stand for.

Images of several kinds (images, videos) share a prompt. How surplus placeholders are removed from
ids and masks is left to `columns.py`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..adapters import Adapter
from .columns import prompt_order, surplus_placeholders
from .merging import CallPlan


@dataclass(frozen=True)
class PromptImage:
    """One image (or video) of a prompt.

    Attributes:
        token_id: its placeholder.
        row: of the batch.
        full: tokens without merging.
        count: tokens it has.
        anchors: [count] int64, those of its placeholders that stay; None for the first ones.
    """

    token_id: int
    row: int
    full: int
    count: int
    anchors: Tensor | None = None


@dataclass(frozen=True)
class PromptImages:
    """All images of a prompt.

    Attributes:
        images: in row order.
        rows: of the prompt; a cache may hold several copies of each (beams, samples).
    """

    images: list[PromptImage]
    rows: int

    def copied(self, rows: int) -> PromptImages:
        """The images after every row was copied as often as it takes for so many rows."""
        copies, rest = divmod(rows, self.rows)
        if rest or copies < 2:
            return self
        found = [
            dataclasses.replace(image, row=row * copies + copy)
            for row in range(self.rows)
            for copy in range(copies)
            for image in self.images
            if image.row == row
        ]
        return PromptImages(found, rows)

    def followed_by(self, later: PromptImages) -> PromptImages:
        """The images of a conversation after another turn with the same rows."""
        both = sorted([*self.images, *later.images], key=lambda image: image.row)
        return PromptImages(both, max(self.rows, later.rows))


def find_placeholders(
    model: Any, token_id: int, input_ids: Tensor | None, inputs_embeds: Tensor | None
) -> Tensor:
    """[B, T] bool, where the placeholders of one kind are.

    Raises:
        ValueError: neither ids nor embeddings are given.
    """
    if input_ids is not None:
        return input_ids == token_id
    if inputs_embeds is None:
        raise ValueError("pixel_values need input_ids or inputs_embeds with image placeholders")
    reference: Tensor = model.get_input_embeddings()(
        torch.tensor(token_id, device=inputs_embeds.device)
    )
    return (inputs_embeds == reference).all(-1)


def all_placeholders(adapter: Adapter, model: Any, input_ids: Tensor) -> Tensor:
    """[B, T] bool, where placeholders of any kind are."""
    found = torch.zeros_like(input_ids, dtype=torch.bool)
    for token_id in adapter.placeholder_ids(model).values():
        found |= input_ids == token_id
    return found


def images_of(
    plan: CallPlan, input_ids: Tensor, counts: dict[str, list[tuple[int, int]]]
) -> list[PromptImage]:
    """The images of a prompt, in its order.

    Args:
        plan: of this call.
        input_ids: [B, T].
        counts: full and merged count of every image by kind.

    Raises:
        ValueError: placeholders and images do not match.
    """
    ids = plan.adapter.placeholder_ids(plan.model)
    tokens = [ids[kind] for kind in counts]
    found = [input_ids == token for token in tokens]
    full = [[one[0] for one in own] for own in counts.values()]
    merged = [[one[1] for one in own] for own in counts.values()]
    for kind, places, whole, less in zip(counts, found, full, merged, strict=True):
        surplus_placeholders(places, whole, less, kind)
    order, rows = prompt_order(found, full, merged)
    return prompt_images(tokens, full, merged, order, rows)


def prompt_images(
    tokens: list[int],
    full: list[list[int]],
    counts: list[list[int]],
    order: list[int],
    rows: list[int],
    anchors: list[Tensor] | None = None,
) -> list[PromptImage]:
    """The images of all kinds in prompt order.

    Args:
        tokens: the placeholder of every kind.
        full: of every kind, tokens per image without merging.
        counts: of every kind, tokens per image.
        order: see `columns.prompt_order`.
        rows: of the images in that order.
        anchors: of the images in that order, see `PromptImage`.
    """
    found = [
        (token, *pair)
        for token, whole, less in zip(tokens, full, counts, strict=True)
        for pair in zip(whole, less, strict=True)
    ]
    stay = [None] * len(order) if anchors is None else anchors
    return [
        PromptImage(found[index][0], row, *found[index][1:], own)
        for index, row, own in zip(order, rows, stay, strict=True)
    ]


def drop_stale_placeholders(
    plan: CallPlan, input_ids: Tensor, images: PromptImages | None
) -> tuple[Tensor, Tensor]:
    """Surplus placeholders of a prompt whose images were encoded in an earlier turn.

    Args:
        plan: of this call.
        input_ids: [B, T], the whole conversation.
        images: of the conversation, in row order; None where nothing is known of them.

    Returns:
        placeholders [B, T] bool and those to drop [B, T] bool.

    Raises:
        ValueError: the placeholders are no whole images.
    """
    placeholders = torch.zeros_like(input_ids, dtype=torch.bool)
    drop = torch.zeros_like(placeholders)
    known = [] if images is None else images.copied(len(input_ids)).images
    schedule = plan.schedule
    for kind, token_id in plan.adapter.placeholder_ids(plan.model).items():
        places = input_ids == token_id
        own = [one for one in known if one.token_id == token_id]
        full, counts = [one.full for one in own], [one.count for one in own]
        found = int(places.sum())
        if kind == "image" and not schedule.packed and found != sum(counts):
            full = [schedule.tokens_in] * _whole_images(found, schedule.tokens_in)
            counts = counts if len(counts) == len(full) else [schedule.tokens_out] * len(full)
        if found and not own and schedule.packed:
            raise ValueError(
                f"the conversation holds {found} {kind} placeholders, but the cache holds no "
                f"{kind}; pass the pixels of all its images"
            )
        placeholders |= places
        if found:
            anchors = [one.anchors for one in own]
            known_ones = [one for one in anchors if one is not None]
            whole = len(known_ones) == len(counts)
            stay = known_ones if whole else None
            drop |= surplus_placeholders(places, full, counts, kind, stay)
    return placeholders, drop


def _whole_images(found: int, full: int) -> int:
    """How many images so many placeholders are.

    Raises:
        ValueError: no whole number.
    """
    images, rest = divmod(found, full)
    if rest:
        raise ValueError(
            f"the prompt holds {found} image placeholders, which is no multiple of the "
            f"{full} of one image; pass the conversation as the processor wrote it"
        )
    return images
