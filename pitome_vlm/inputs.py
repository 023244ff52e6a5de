"""From a caller's inputs to shortened ones: encode the images once, drop surplus placeholders.

Knows: what a Hugging Face LLaVA takes as input. Does not know: `generate`, algorithms, or how a
tower merges. Sizes and positions of the merged tokens stay with the prompt from here on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from .calibration import (
    Calibration,
    caller_positions,
    image_offsets,
    unreduced_positions,
)
from .merge_pass import VisualTokens
from .merging import Merging
from .prompt import (
    IGNORED_LABEL,
    Compaction,
    compact_positions,
    compaction,
    surplus_placeholders,
)

FEATURE_OPTIONS = ("vision_feature_layer", "vision_feature_select_strategy")
SEQUENCE_INPUTS = ("input_ids", "inputs_embeds", "attention_mask", "labels", "position_ids")


@dataclass(frozen=True)
class CompactPrompt:
    """A batch whose visual tokens are merged and embedded, ready for the language model.

    Attributes:
        inputs_embeds: [B, S, C].
        input_ids: [B, S] or None where the caller gave embeddings.
        attention_mask: [B, S] or None where nothing is padded.
        labels: [B, S] or None.
        position_ids: [B, S]: float32 in the unreduced layout, or with compact positions the
            caller's own, shortened, or None where there were none.
        sizes: [B, S] float32, patches behind every column (1 for text).
        packed_positions: [B, S] the caller's integer positions, shortened, or None; they tell
            where samples that share a row begin.
        calibration: what the language model is to be told.
        visual: the visual tokens themselves.
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
    calibration: Calibration
    visual: VisualTokens
    compaction: Compaction
    placeholders: Tensor


def image_token_id(model: Any) -> int:
    """The id of the image placeholder."""
    config: Any = model.config
    for name in ("image_token_id", "image_token_index"):
        value = getattr(config, name, None)
        if value is not None:
            return int(value)
    raise ValueError("the model's config names no image_token_id")


def find_placeholders(model: Any, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """[B, T] bool, where the image placeholders are.

    Raises:
        ValueError: neither ids nor embeddings are given.
    """
    token = image_token_id(model)
    if input_ids is not None:
        return input_ids == token
    if inputs_embeds is None:
        raise ValueError("pixel_values need input_ids or inputs_embeds with image placeholders")
    reference: Tensor = model.get_input_embeddings()(
        torch.tensor(token, device=inputs_embeds.device)
    )
    return (inputs_embeds == reference).all(-1)


def prepare(
    model: Any,
    merging: Merging,
    inputs: dict[str, Any],
    *,
    left: bool | None = None,
    cached: int = 0,
    start: Tensor | None = None,
) -> CompactPrompt:
    """Encode the images, shorten the prompt and put the visual tokens in.

    Args:
        model: the wrapped LLaVA itself (no PeftModel around it).
        merging: what `wrap` put on it.
        inputs: `pixel_values`, and of `SEQUENCE_INPUTS` and `FEATURE_OPTIONS` what there is.
        left: see `prompt.compaction`.
        cached: tokens already in the cache that is passed along.
        start: [B] position of the first new column in the unreduced layout, None for 0.

    Raises:
        ValueError: placeholders and images do not match, or an input cannot be shortened.
    """
    ids: Tensor | None = inputs.get("input_ids")
    given: Tensor | None = inputs.get("inputs_embeds")
    placeholders = find_placeholders(model, ids, given)
    past, mask = _split_mask(inputs.get("attention_mask"), placeholders.shape[1], cached)
    options = {name: inputs[name] for name in FEATURE_OPTIONS if inputs.get(name) is not None}
    visual = merging.encode(model, _checked_pixels(inputs["pixel_values"]), **options)
    drop = surplus_placeholders(placeholders, visual.full_counts, visual.counts)
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
    packed = None
    if own is not None:
        own = own.expand_as(drop).to(drop.device)
        packed = moves.take(compact_positions(own, drop), 0)
    calibration = merging.calibration(model)
    positions = packed
    if calibration.positions != "compact":
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
        calibration=calibration,
        visual=visual,
        compaction=moves,
        placeholders=placeholders,
    )


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


def _checked_pixels(pixel_values: Any) -> Tensor:
    if isinstance(pixel_values, Tensor) and pixel_values.dim() == 4 and len(pixel_values):
        return pixel_values
    shown = (
        f"a tensor of shape {tuple(pixel_values.shape)}"
        if isinstance(pixel_values, Tensor)
        else type(pixel_values).__name__
    )
    raise ValueError(
        "pixel_values must be a tensor [images, 3, height, width] with at least one image, as the "
        f"model's processor makes them with return_tensors='pt'; got {shown}"
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
    model: Any, merging: Merging, input_ids: Tensor, counts: list[int] | None
) -> tuple[Tensor, Tensor]:
    """Surplus placeholders of a prompt whose images were encoded in an earlier turn.

    Args:
        model: the wrapped LLaVA.
        merging: what `wrap` put on it.
        input_ids: [B, T], the whole conversation.
        counts: visual tokens each image of the conversation has, in row order; None for images
            that all have the scheduled count.

    Returns:
        placeholders [B, T] bool and those to drop [B, T] bool.

    Raises:
        ValueError: the placeholders are no whole images.
    """
    placeholders = input_ids == image_token_id(model)
    schedule = merging.schedule(model)
    found = int(placeholders.sum())
    images, rest = divmod(found, schedule.tokens_in)
    if rest:
        raise ValueError(
            f"the prompt holds {found} image placeholders, which is no multiple of the "
            f"{schedule.tokens_in} of one image; pass the conversation as the processor wrote it"
        )
    if counts is None or len(counts) != images:
        counts = [schedule.tokens_out] * images
    return placeholders, surplus_placeholders(placeholders, [schedule.tokens_in] * images, counts)
