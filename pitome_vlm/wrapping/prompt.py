"""From a caller's inputs to shortened ones: encode the images once, drop surplus placeholders.

Sizes and positions of the merged tokens stay with the prompt from here on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ..merge.tokens import Encoded, VisualTokens
from ..releases import HANDED_FEATURES
from .columns import (
    IGNORED_LABEL,
    Compaction,
    compaction,
    prompt_order,
    surplus_placeholders,
)
from .hand_over import PromptFeatures
from .image_cache import ImageCache
from .merging import CallPlan
from .placeholders import PromptImages, find_placeholders, prompt_images
from .places import prompt_positions

SEQUENCE_INPUTS = ("input_ids", "inputs_embeds", "attention_mask", "labels", "position_ids")


@dataclass(frozen=True)
class CompactPrompt:
    """A batch whose visual tokens are merged and embedded, ready for the language model.

    Attributes:
        inputs_embeds: [B, S, C]; None where the model's own forward embeds the ids.
        input_ids: [B, S] or None where the caller gave embeddings.
        features: what the model's own forward puts in at placeholders; None where that is done.
        attention_mask: [B, S] or None where nothing is padded.
        labels: [B, S] or None.
        position_ids: [B, S] (or [B, S, D] where a model has D of them): float32 in the unreduced
            layout, or with compact positions the
            caller's own, shortened, or None where there were none.
        last_position: [B] float32, the position at the end of every row in that layout; None where
            it is that of the last column.
        sizes: [B, S] float32, patches that every column stands for (1 for text).
        packed_positions: [B, S] the caller's integer positions, shortened, or None; they tell
            where samples that share a row begin.
        visual: the visual tokens themselves, in prompt order whatever their kind.
        encoded: the same by kind.
        images: what they are, in the same order.
        compaction: where every column went.
        placeholders: [B, T] bool, the image placeholders before compaction.
    """

    inputs_embeds: Tensor | None
    input_ids: Tensor | None
    features: PromptFeatures | None
    attention_mask: Tensor | None
    labels: Tensor | None
    position_ids: Tensor | None
    last_position: Tensor | None
    sizes: Tensor
    packed_positions: Tensor | None
    visual: VisualTokens
    encoded: list[Encoded]
    images: PromptImages
    compaction: Compaction
    placeholders: Tensor

    def language_inputs(self) -> dict[str, Any]:
        """What a forward pass over the prompt reads: embeddings, or ids and features."""
        if self.features is None:
            return {"inputs_embeds": self.inputs_embeds}
        assert self.input_ids is not None
        handed = self.features.of_columns(self.input_ids, self.features.before)
        return {"input_ids": self.input_ids, HANDED_FEATURES: handed}


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
    batch, width = (ids if given is None else given).shape[:2]  # type: ignore[union-attr]
    past, mask = _split_mask(for_every_row(inputs.get("attention_mask"), batch), width, cached)
    labels = inputs.get("labels")
    if labels is not None and labels.shape[1] != width:
        raise ValueError(
            f"labels have {labels.shape[1]} columns, but the prompt has {width}; make them from "
            "the input_ids that the processor returned, in which images are placeholders already"
        )
    encoded = plan.encode(image_cache)
    found = [find_placeholders(plan.model, one.token_id, ids, given) for one in encoded]
    placeholders, drop = _joined_placeholders(found, encoded)
    visual, images = _in_prompt_order(found, encoded)
    # The mask where it hides something.
    hiding = None if mask is None or bool(mask.all()) else mask
    moves = compaction(placeholders, drop, hiding, left=left)
    slots = moves.take(placeholders, False)
    short = None if ids is None else moves.take(ids, pad_id(plan.model))
    if plan.adapter.own_scatter:
        embeds, features = None, PromptFeatures(_needed(plan, short), encoded, cached)
    else:
        embeds = _embedded(plan.model, short, given, slots, moves, visual)
        features = None
    positions, last, packed = prompt_positions(
        plan, inputs, visual, placeholders, drop, moves, slots, hiding, start
    )
    shown, sizes = _visible(hiding, placeholders, visual)
    ones = torch.ones(slots.shape, dtype=torch.float32, device=slots.device)
    return CompactPrompt(
        inputs_embeds=embeds,
        input_ids=short,
        features=features,
        attention_mask=compact_attention_mask(moves, mask if hiding is None else shown, past),
        labels=None if labels is None else moves.take(labels, IGNORED_LABEL),
        position_ids=positions,
        last_position=last,
        sizes=ones.masked_scatter(slots, sizes.to(slots.device)),
        packed_positions=packed,
        visual=visual,
        encoded=encoded,
        images=images,
        compaction=moves,
        placeholders=placeholders,
    )


def _needed(plan: CallPlan, ids: Tensor | None) -> Tensor:
    if ids is None:
        raise ValueError(
            f"{type(plan.model).__name__} finds the places of visual tokens by input_ids; pass "
            "them instead of inputs_embeds"
        )
    return ids


def _embedded(
    model: Any,
    ids: Tensor | None,
    given: Tensor | None,
    slots: Tensor,
    moves: Compaction,
    visual: VisualTokens,
) -> Tensor:
    """[B, S, C] of the shortened prompt, with the visual tokens at its placeholders.

    Args:
        model: the model.
        ids: [B, S] of the shortened prompt, or None.
        given: [B, T, C] of the caller's, in place of ids.
        slots: [B, S] bool, the placeholders that stay.
        moves: where the columns went.
        visual: the visual tokens.
    """
    if given is not None:
        embeds = moves.take(given, 0)
    else:
        # Placeholders and padding may be outside of the vocabulary; nobody reads their embedding.
        nothing = slots | ~moves.valid if moves.padded else slots
        embeds = model.get_input_embeddings()(cast(Tensor, ids).masked_fill(nothing, 0))
    features = torch.cat(visual.features).to(embeds.device, embeds.dtype)
    return embeds.masked_scatter(slots[..., None].to(embeds.device), features)


def _visible(
    mask: Tensor | None, placeholders: Tensor, visual: VisualTokens
) -> tuple[Tensor | None, Tensor]:
    """A mask over part of an image, carried over to its merged tokens.

    A merged token can be attended to where at least one of its patches can, and stands for as
    many patches as are visible.

    Returns:
        The mask [B, T], meaningful at columns that stay, and the sizes of all tokens, [sum of
        counts] float32, 1 where a token is hidden.
    """
    sizes = torch.cat(visual.sizes())
    if mask is None or visual.counts == visual.full_counts:
        return mask, sizes
    if int(placeholders.sum()) != sum(visual.full_counts):
        return mask, sizes
    own = mask.to(placeholders.device)[placeholders] != 0
    if bool(own.all()):
        return mask, sizes
    found, places = [], []
    parts = torch.split(own, visual.full_counts)
    groups = zip(visual.source_maps, visual.anchors, visual.counts, parts, strict=True)
    for source, anchors, count, part in groups:
        seen = torch.bincount(source, weights=part.to(source.device).float(), minlength=count)
        found.append(seen)
        stays = anchors.sort().values
        places.append(part.to(mask).index_copy(0, stays.to(mask.device), (seen > 0).to(mask)))
    shown = mask.masked_scatter(placeholders.to(mask.device), torch.cat(places).to(mask.device))
    return shown, torch.cat(found).clamp(min=1)


def _joined_placeholders(found: list[Tensor], encoded: list[Encoded]) -> tuple[Tensor, Tensor]:
    """Placeholders of all kinds and the surplus ones among them, both [B, T] bool."""
    drop = [
        surplus_placeholders(
            places, one.visual.full_counts, one.visual.counts, one.kind, one.visual.anchors
        )
        for places, one in zip(found, encoded, strict=True)
    ]
    return functools.reduce(torch.logical_or, found), functools.reduce(torch.logical_or, drop)


def _in_prompt_order(
    found: list[Tensor], encoded: list[Encoded]
) -> tuple[VisualTokens, PromptImages]:
    """The visual tokens of all kinds as the prompt shows them."""
    parts = [one.visual for one in encoded]
    full, counts = [part.full_counts for part in parts], [part.counts for part in parts]
    order, rows = prompt_order(found, full, counts)
    visual = VisualTokens.joined(parts, order)
    tokens = [one.token_id for one in encoded]
    images = prompt_images(tokens, full, counts, order, rows, visual.anchors)
    return visual, PromptImages(images, len(found[0]))


def other_arguments(
    plan: CallPlan,
    call: dict[str, Any],
    shape: tuple[int, ...],
    take: Callable[[Tensor, int], Tensor],
) -> dict[str, Any]:
    """What a call has besides images and `SEQUENCE_INPUTS`.

    Args:
        plan: of this call.
        call: its arguments.
        shape: [B, T]; further integers of that shape (token types) are shortened too.
        take: [B, T] values and a fill for padding to [B, S].
    """
    consumed = {*plan.adapter.vision_inputs, *plan.adapter.feature_options, *SEQUENCE_INPUTS}
    consumed.add("cache_position")
    return {
        name: take(value, 0)
        if isinstance(value, Tensor) and value.shape == shape and not value.is_floating_point()
        else value
        for name, value in call.items()
        if name not in consumed
    }


def for_every_row(mask: Any, batch: int) -> Any:
    """A mask [1, T] that holds for all rows as [batch, T]; any other as it is."""
    if isinstance(mask, Tensor) and mask.dim() == 2 and len(mask) == 1:
        return mask.expand(batch, -1)
    return mask


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
    also = f" and the {cached} in the cache" if cached else ""
    raise ValueError(
        f"attention_mask must cover the {width} tokens of the prompt{also}, got "
        f"{mask.shape[1]} columns"
    )


def compact_attention_mask(
    moves: Compaction, mask: Tensor | None, past: Tensor | None = None
) -> Tensor | None:
    """The mask of a shortened prompt, None where none was given and none is needed."""
    if mask is None:
        return moves.valid.long() if moves.padded else None
    compact = moves.take(mask, 0)
    return compact if past is None else torch.cat([past.to(compact.device), compact], 1)


def pad_id(model: Any) -> int:
    """The token id that fills padded places; 0 if the model names none."""
    config: Any = model.config
    for holder in (config, getattr(config, "text_config", None)):
        value = getattr(holder, "pad_token_id", None)
        if value is not None:
            return int(value)
    return 0
