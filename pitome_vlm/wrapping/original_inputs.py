"""From the inputs of the original llava package to a prompt with merged visual tokens.

A layout without merging (see `original_layout.py`) becomes a shorter one, column by column.

Axes: B rows, L columns without merging, S columns with it, P visual tokens of all images without
merging, M with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..adapters.original_code import image_batch
from ..merge.tokens import VisualTokens
from .columns import IGNORED_LABEL, Compaction, compaction
from .image_cache import ImageCache
from .merging import CallPlan
from .original_layout import Layout, lay_out
from .placeholders import PromptImage, PromptImages
from .prompt import CompactPrompt


def prepare_original(
    plan: CallPlan,
    inputs: dict[str, Any],
    *,
    image_cache: ImageCache | None = None,
    left: bool | None = None,
    start: Tensor | None = None,
) -> CompactPrompt:
    """Lay a prompt out, encode its images, and put the merged tokens in.

    A prompt is cut to the length that the model's config allows after merging, when there is less
    to cut.

    Args:
        plan: of this call.
        inputs: `input_ids`, `images`, and of `attention_mask`, `labels`, `position_ids`,
            `image_sizes` what there is.
        image_cache: where to look for encoded images first.
        left: pad rows of different length at the start; None takes the side of the model's config.
        start: [B] position of the first column, None for 0.

    Raises:
        ValueError: the images are of another form, or see `original_layout.lay_out`.
    """
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    batch = image_batch(inputs["images"], inputs.get("image_sizes"))
    model, calibration = plan.model, plan.calibration
    adapter: Any = plan.adapter
    tokens_in = plan.schedule.tokens_in
    layout = lay_out(model, batch, adapter.items_of(batch), tokens_in, ids, mask)
    encoded = plan.encode(image_cache)
    visual = encoded[0].visual
    images = _images_of(layout, visual, encoded[0].token_id)
    layout = layout.to(visual.features[0].device)
    at, tokens = _places(layout, visual, in_order=plan.config.restore_order)
    slots = torch.zeros_like(layout.valid).flatten().index_fill(0, at, True).view_as(layout.valid)
    keep = _shortened(model, (layout.text >= 0) | slots)
    shown = keep[slots]
    slots, tokens = slots & keep, tokens[shown]
    if left is None:
        left = getattr(model.config, "tokenizer_padding_side", "right") == "left"
    moves = compaction(slots, ~keep, None, left=left)
    last = None
    if calibration.positions == "compact":
        positions = _counted(inputs.get("position_ids"), moves)
    else:
        place = _places_without_merging(layout.valid, start)
        last = place.amax(1)
        anchors = torch.cat(visual.anchors)[tokens]
        offsets = torch.cat(visual.positions(calibration.positions))[tokens]
        place = place.masked_scatter(slots, place[slots] + offsets - anchors)
        positions = _with_padding(moves.take(place, 0.0), moves.valid)
    ones = torch.ones(slots.shape, dtype=torch.float32, device=slots.device)
    sizes = ones.masked_scatter(slots, torch.cat(visual.sizes())[tokens])
    features = torch.cat(visual.features)[tokens]
    return CompactPrompt(
        inputs_embeds=_embedded(model, ids, layout, moves, slots, features),
        input_ids=None,
        features=None,
        attention_mask=_mask(mask, moves),
        labels=_labels(inputs.get("labels"), layout, moves),
        position_ids=positions,
        last_position=last,
        sizes=moves.take(sizes, 1.0),
        packed_positions=None,
        visual=visual,
        encoded=encoded,
        images=images,
        compaction=moves,
        placeholders=slots,
    )


def _images_of(layout: Layout, visual: VisualTokens, token_id: int) -> PromptImages:
    """What the prompt shows; images of rows without a placeholder are not shown.

    Raises:
        ValueError: an image has another number of columns than tokens.
    """
    found = []
    for row, items in enumerate(layout.item):
        shown, columns = items[items >= 0].unique_consecutive(return_counts=True)
        for item, n in zip(shown.tolist(), columns.tolist(), strict=True):
            full, count = visual.full_counts[item], visual.counts[item]
            if n != full:
                raise ValueError(
                    f"image {item + 1} has {full} visual tokens, but the model's own preparation "
                    f"of the prompt puts {n} of them in; such a model cannot be followed"
                )
            found.append(PromptImage(token_id, row, full, count))
    return PromptImages(found, len(layout.item))


def _places(layout: Layout, visual: VisualTokens, *, in_order: bool) -> tuple[Tensor, Tensor]:
    """The columns of merged tokens, rising, and the token of each.

    A token takes the column of the one it is named after. Tokens in another order than their
    names take the columns of their image in that order.

    Returns:
        Indices into the B L columns and into the M tokens, int64.
    """
    device, item = layout.item.device, layout.item.flatten()
    full = torch.tensor(visual.full_counts, device=device)
    starts = full.cumsum(0) - full
    columns = (item >= 0).nonzero()[:, 0]
    column_of = torch.full((int(sum(visual.full_counts)),), -1, device=device)
    column_of[starts[item[columns]] + layout.place.flatten()[columns]] = columns
    counts = torch.tensor(visual.counts, device=device)
    owner = torch.repeat_interleave(torch.arange(len(counts), device=device), counts)
    at = column_of[torch.cat(visual.anchors) + starts[owner]]
    tokens = (at >= 0).nonzero()[:, 0]
    at = at[tokens]
    if not in_order:
        by_column = at.argsort()
        at = at[by_column[owner[tokens][by_column].argsort(stable=True)]]
    order = at.argsort()
    return at[order], tokens[order]


def _shortened(model: Any, keep: Tensor) -> Tensor:
    """[B, L] bool, without what is longer than the model's config allows."""
    limit = getattr(model.config, "tokenizer_model_max_length", None)
    return keep if limit is None else keep & (keep.long().cumsum(1) <= limit)


def _places_without_merging(valid: Tensor, start: Tensor | None) -> Tensor:
    """[B, L] float32, the place of every column among those of its row that are not padding."""
    place = (valid.long().cumsum(1) - 1).clamp(min=0).float()
    return place if start is None else place + start.to(place.device)[:, None]


def _embedded(
    model: Any,
    input_ids: Tensor,
    layout: Layout,
    moves: Compaction,
    slots: Tensor,
    features: Tensor,
) -> Tensor:
    """[B, S, C]: words, visual tokens, and zeros for padding as the package has it."""
    core = model.get_model()
    words = moves.take(_at_columns(input_ids, layout.text, 0), 0)
    embeds: Tensor = core.embed_tokens(words)
    device = embeds.device
    is_word = moves.take(layout.text >= 0, False).to(device)
    embeds = embeds.masked_fill(~is_word[..., None], 0.0)
    where = moves.take(slots, False).to(device)
    return embeds.masked_scatter(where[..., None], features.to(embeds))


def _at_columns(values: Tensor, text: Tensor, fill: int) -> Tensor:
    """[B, T] values of a prompt's columns at [B, L] columns of its layout."""
    text = text.to(values.device)
    return values.gather(1, text.clamp(min=0)).masked_fill(text < 0, fill)


def _mask(given: Tensor | None, moves: Compaction) -> Tensor | None:
    if given is not None:
        return moves.valid.to(given)
    return moves.valid.long() if moves.padded else None


def _labels(given: Tensor | None, layout: Layout, moves: Compaction) -> Tensor | None:
    if given is None:
        return None
    return moves.take(_at_columns(given, layout.text, IGNORED_LABEL), IGNORED_LABEL)


def _counted(given: Tensor | None, moves: Compaction) -> Tensor | None:
    """As the package does: positions counted anew where the caller gave any, else none."""
    if given is None:
        return None
    return (moves.valid.long().cumsum(1) - 1).clamp(min=0).to(given) * moves.valid.to(given)


def _with_padding(positions: Tensor, valid: Tensor) -> Tensor:
    """Columns of padding after a row repeat its last position, from which decoding counts on."""
    columns = torch.arange(valid.shape[1], device=valid.device)
    last = (columns * valid).amax(1, keepdim=True)
    return positions.where(valid | (columns < last), positions.gather(1, last))
