"""From a caller's inputs to shortened ones: encode the images once, drop surplus placeholders.

Knows: what a Hugging Face LLaVA takes as input beside what its adapter encodes, and how images of
several kinds (pictures, videos) share a prompt. Does not know: `generate`, algorithms, or how a
tower merges. Sizes and positions of the merged tokens stay with the prompt from here on.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ..adapters import Adapter
from ..merge.tokens import Encoded, VisualTokens
from .columns import (
    IGNORED_LABEL,
    Compaction,
    compact_positions,
    compaction,
    prompt_order,
    surplus_placeholders,
)
from .image_cache import ImageCache
from .merging import CallPlan
from .positions import (
    Calibration,
    caller_positions,
    image_offsets,
    spread_places,
    unreduced_positions,
)

SEQUENCE_INPUTS = ("input_ids", "inputs_embeds", "attention_mask", "labels", "position_ids")


@dataclass(frozen=True)
class PromptImage:
    """One image (or video) of a prompt.

    Attributes:
        token_id: its placeholder.
        row: of the batch.
        full: tokens without merging.
        count: tokens it has.
    """

    token_id: int
    row: int
    full: int
    count: int


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


@dataclass(frozen=True)
class CompactPrompt:
    """A batch whose visual tokens are merged and embedded, ready for the language model.

    Attributes:
        inputs_embeds: [B, S, C].
        input_ids: [B, S] or None where the caller gave embeddings.
        attention_mask: [B, S] or None where nothing is padded.
        labels: [B, S] or None.
        position_ids: [B, S] (or [B, S, D] where a model has D of them): float32 in the unreduced
            layout, or with compact positions the
            caller's own, shortened, or None where there were none.
        sizes: [B, S] float32, patches behind every column (1 for text).
        packed_positions: [B, S] the caller's integer positions, shortened, or None; they tell
            where samples that share a row begin.
        visual: the visual tokens themselves, in prompt order whatever their kind.
        encoded: the same by kind.
        images: what they are, in the same order.
        compaction: where every column went.
        placeholders: [B, T] bool, the image placeholders before compaction.
    """

    inputs_embeds: Tensor
    input_ids: Tensor | None
    attention_mask: Tensor | None
    labels: Tensor | None
    position_ids: Tensor | None
    sizes: Tensor
    packed_positions: Tensor | None
    visual: VisualTokens
    encoded: list[Encoded]
    images: PromptImages
    compaction: Compaction
    placeholders: Tensor


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


def prepare(
    plan: CallPlan,
    inputs: dict[str, Any],
    *,
    image_cache: ImageCache | None = None,
    left: bool | None = None,
    cached: int = 0,
    start: Tensor | None = None,
) -> CompactPrompt:
    """Encode the images, shorten the prompt and put the visual tokens in.

    Args:
        plan: of this call.
        inputs: of `SEQUENCE_INPUTS` what there is, and what places follow from.
        image_cache: where to look for encoded images first.
        left: see `columns.compaction`.
        cached: tokens already in the cache that is passed along.
        start: [B] position of the first new column in the unreduced layout, None for 0.

    Raises:
        ValueError: placeholders and images do not match, or an input cannot be shortened.
    """
    ids: Tensor | None = inputs.get("input_ids")
    given: Tensor | None = inputs.get("inputs_embeds")
    if ids is None and given is None:
        raise ValueError("pixel_values need input_ids or inputs_embeds with image placeholders")
    width = (ids if given is None else given).shape[1]  # type: ignore[union-attr]
    past, mask = _split_mask(inputs.get("attention_mask"), width, cached)
    model, calibration = plan.model, plan.calibration
    encoded = plan.encode(image_cache)
    found = [find_placeholders(model, one.token_id, ids, given) for one in encoded]
    placeholders, drop = _joined_placeholders(found, encoded)
    visual, images = _in_prompt_order(found, encoded)
    moves = compaction(placeholders, drop, mask, left=left)
    compact_ids = None if ids is None else moves.take(ids, _pad_id(model))
    if given is not None:
        embeds = moves.take(given, 0)
    else:
        # Placeholders outside of the vocabulary are legal; their embedding is replaced anyway.
        text = cast(Tensor, ids).masked_fill(placeholders, 0)
        embeds = model.get_input_embeddings()(moves.take(text, 0))
    slots = moves.take(placeholders, False)
    features = torch.cat(visual.features).to(embeds.device, embeds.dtype)
    compact_mask = compact_attention_mask(moves, mask, past)
    labels, own = inputs.get("labels"), inputs.get("position_ids")
    places = plan.adapter.prompt_places(model, inputs, mask)
    packed, own = None, own if places is None else None
    if own is not None:
        own = own.expand_as(drop).to(drop.device)
        packed = moves.take(compact_positions(own, drop), 0)
    positions = packed
    if places is not None:
        found_places = spread_places(
            places, placeholders, visual.source_maps, visual.anchors, calibration
        )
        positions = moves.take(found_places, 0.0)
        positions = positions if start is None else positions + start[:, None, None]
    elif calibration.positions != "compact":
        positions = _layout(calibration, visual, placeholders, moves, mask, own, start)
    ones = torch.ones(slots.shape, dtype=torch.float32, device=slots.device)
    return CompactPrompt(
        inputs_embeds=embeds.masked_scatter(slots[..., None].to(embeds.device), features),
        input_ids=compact_ids,
        attention_mask=compact_mask,
        labels=None if labels is None else moves.take(labels, IGNORED_LABEL),
        position_ids=positions,
        sizes=ones.masked_scatter(slots, torch.cat(visual.sizes()).to(slots.device)),
        packed_positions=packed,
        visual=visual,
        encoded=encoded,
        images=images,
        compaction=moves,
        placeholders=placeholders,
    )


def _joined_placeholders(found: list[Tensor], encoded: list[Encoded]) -> tuple[Tensor, Tensor]:
    """Placeholders of all kinds and the surplus ones among them, both [B, T] bool."""
    placeholders, drop = torch.zeros_like(found[0]), torch.zeros_like(found[0])
    for places, one in zip(found, encoded, strict=True):
        placeholders |= places
        full, counts = one.visual.full_counts, one.visual.counts
        drop |= surplus_placeholders(places, full, counts, one.kind)
    return placeholders, drop


def _in_prompt_order(
    found: list[Tensor], encoded: list[Encoded]
) -> tuple[VisualTokens, PromptImages]:
    """The visual tokens of all kinds as the prompt shows them."""
    parts = [one.visual for one in encoded]
    full, counts = [part.full_counts for part in parts], [part.counts for part in parts]
    order, rows = prompt_order(found, full, counts)
    images = _prompt_images([one.token_id for one in encoded], full, counts, order, rows)
    return VisualTokens.joined(parts, order), PromptImages(images, len(found[0]))


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
    return _prompt_images(tokens, full, merged, order, rows)


def _prompt_images(
    tokens: list[int],
    full: list[list[int]],
    counts: list[list[int]],
    order: list[int],
    rows: list[int],
) -> list[PromptImage]:
    found = [
        (token, *pair)
        for token, whole, less in zip(tokens, full, counts, strict=True)
        for pair in zip(whole, less, strict=True)
    ]
    return [
        PromptImage(found[index][0], row, *found[index][1:])
        for index, row in zip(order, rows, strict=True)
    ]


def _layout(
    calibration: Calibration,
    visual: VisualTokens,
    placeholders: Tensor,
    moves: Compaction,
    mask: Tensor | None,
    own: Tensor | None,
    start: Tensor | None,
) -> Tensor:
    """[B, S] float32, positions that leave the text where it was without merging.

    Args:
        calibration: positions "mean" or "original".
        visual: the visual tokens.
        placeholders: [B, T] bool.
        moves: where the columns went.
        mask: [B, T] over the new columns, or None.
        own: [B, T] the caller's positions, or None.
        start: position of the first new column where the caller gave none.
    """
    offsets = image_offsets(calibration, visual.positions(), visual.anchors)
    whole = int(placeholders.sum()) == sum(visual.full_counts)
    if own is not None and not whole:
        # Written for the shortened prompt: there is no other layout to point back to.
        return moves.take(own, 0).float()
    if own is not None:
        spread = caller_positions(own, placeholders, visual.full_counts, visual.counts, offsets)
        return moves.take(spread, 0.0)
    attended = moves.valid if mask is None else moves.take(mask, 0) != 0
    slots = moves.take(placeholders, False)
    return unreduced_positions(
        slots, attended | slots, visual.full_counts, visual.counts, offsets, start
    )


def _split_mask(mask: Any, width: int, cached: int) -> tuple[Tensor | None, Tensor | None]:
    """A mask's part over the cache and its part over the new tokens.

    Raises:
        ValueError: the mask has other axes, or covers another number of tokens.
    """
    if mask is None:
        return None, None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        shown = f"{mask.dim()} axes" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            "attention_mask must be [batch, tokens] where images are merged, because columns are "
            f"removed from it; got {shown}"
        )
    if mask.shape[1] == width:
        return None, mask
    if cached and mask.shape[1] == cached + width:
        return mask[:, :cached], mask[:, cached:]
    beside = f" and the {cached} in the cache" if cached else ""
    raise ValueError(
        f"attention_mask must cover the {width} tokens of the prompt{beside}, got "
        f"{mask.shape[1]} columns"
    )


def compact_attention_mask(
    moves: Compaction, mask: Tensor | None, past: Tensor | None = None
) -> Tensor | None:
    """The mask of a shortened prompt, None where none was given and none is needed."""
    if mask is None:
        return None if bool(moves.valid.all()) else moves.valid.long()
    compact = moves.take(mask, 0)
    return compact if past is None else torch.cat([past.to(compact.device), compact], 1)


def _pad_id(model: Any) -> int:
    config: Any = model.config
    for holder in (config, getattr(config, "text_config", None)):
        value = getattr(holder, "pad_token_id", None)
        if value is not None:
            return int(value)
    return 0


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
            drop |= surplus_placeholders(places, full, counts, kind)
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
