"""From the inputs of the original llava package to a prompt with merged visual tokens.

Knows: how a layout without merging, column by column, becomes a shorter one. Does not know: how the
package makes that layout (`original_layout.py`), `forward`, `generate`, algorithms.

Axes: B rows, L columns without merging, S columns with it, P visual tokens of all tiles without
merging, M with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .calibration import Calibration
from .inputs import CompactPrompt
from .merge_pass import VisualTokens
from .merging import Merging
from .original_layout import Layout, lay_out
from .prompt import IGNORED_LABEL, Compaction, compaction


@dataclass(frozen=True)
class _Places:
    """Where merged tokens sit in a layout without merging.

    Attributes:
        slots: [B, L] bool, columns that merged tokens take.
        tokens: [slots] int64, the token of every slot in row order, an index into M.
        sizes: [M] float32, patches behind every token that the layout shows.
        positions: [M] float32, position of every token.
    """

    slots: Tensor
    tokens: Tensor
    sizes: Tensor
    positions: Tensor


def prepare_original(
    model: Any,
    merging: Merging,
    prepare: Any,
    inputs: dict[str, Any],
    *,
    calibration: Calibration,
    left: bool | None = None,
    start: Tensor | None = None,
) -> CompactPrompt:
    """Lay a prompt out, encode its images, and put the merged tokens in.

    Where an image is several tiles, each is merged on its own. A prompt is cut to the length that
    the model's config allows after merging, when there is less to cut.

    Args:
        model: the wrapped model itself (no PeftModel around it).
        merging: what `wrap` put on it.
        prepare: the model's own `prepare_inputs_labels_for_multimodal`, a bound method.
        inputs: `input_ids`, `images`, and of `attention_mask`, `labels`, `position_ids`,
            `image_sizes` what there is.
        calibration: what the language model is to be told.
        left: pad rows of different length in front; None takes the side of the model's config.
        start: [B] position of the first column, None for 0.

    Raises:
        ValueError: see `original_layout.lay_out`.
    """
    layout = lay_out(model, prepare, inputs, merging.schedule(model).tokens_in)
    visual = merging.encode(model, layout.pixels)
    layout = layout.to(visual.features[0].device)
    place = _places_without_merging(layout.valid, start)
    places = _merged_places(layout, visual, place, merging, calibration)
    keep = (layout.text >= 0) | places.slots | _live(layout, places.slots)
    limit = getattr(model.config, "tokenizer_model_max_length", None)
    if limit is not None:
        keep &= keep.long().cumsum(1) <= limit
    slots, tokens = places.slots & keep, places.tokens[keep[places.slots]]
    if left is None:
        left = getattr(model.config, "tokenizer_padding_side", "right") == "left"
    moves = compaction(slots, ~keep, None, left=left)
    if calibration.positions == "compact":
        positions = _counted(inputs.get("position_ids"), moves)
    else:
        place = place.masked_scatter(slots, places.positions[tokens])
        positions = _with_padding(moves.take(place, 0.0), moves.valid)
    sizes = torch.ones_like(place).masked_scatter(slots, places.sizes[tokens])
    features = torch.cat(visual.features)[tokens]
    return CompactPrompt(
        inputs_embeds=_embedded(model, inputs["input_ids"], layout, moves, slots, features),
        input_ids=None,
        attention_mask=_mask(inputs.get("attention_mask"), moves),
        labels=_labels(inputs.get("labels"), layout, moves),
        position_ids=positions,
        sizes=moves.take(sizes, 1.0),
        packed_positions=None,
        calibration=calibration,
        visual=visual,
        compaction=moves,
        placeholders=slots,
    )


def _places_without_merging(valid: Tensor, start: Tensor | None) -> Tensor:
    """[B, L] float32, the place of every column among those of its row that are not padding."""
    place = (valid.long().cumsum(1) - 1).clamp(min=0).float()
    return place if start is None else place + start.to(place.device)[:, None]


def _merged_places(
    layout: Layout,
    visual: VisualTokens,
    place: Tensor,
    merging: Merging,
    calibration: Calibration,
) -> _Places:
    """Every token at the column of the patch it is named after.

    Padding around a picture is cut off by the package after encoding: a token sits at its first
    patch that is left where the one it is named after is gone, and is gone with the last of them.
    """
    device, flat = place.device, layout.patch.flatten()
    counts = torch.tensor(visual.counts, device=device)
    tile = torch.repeat_interleave(torch.arange(len(counts), device=device), counts)
    owner = _numbered(visual.source_maps, visual.counts)
    columns = (flat >= 0).nonzero()[:, 0]
    group = owner[flat[columns]]
    total = len(tile)
    zeros = torch.zeros(total, dtype=torch.float32, device=device)
    sizes = zeros.index_add(0, group, torch.ones_like(group, dtype=torch.float32))
    column_of = torch.full_like(owner, -1)
    column_of[flat[columns]] = columns
    named = column_of[_numbered(visual.anchors, visual.full_counts)]
    first = torch.full_like(named, flat.numel()).scatter_reduce(0, group, columns, "amin")
    shown = (sizes > 0).nonzero()[:, 0]
    at = torch.where(named >= 0, named, first)[shown]
    if calibration.positions == "original":
        positions = zeros.index_put((shown,), place.flatten()[at])
    else:
        positions = zeros.index_add(0, group, place.flatten()[columns]) / sizes.clamp(min=1)
    if not merging.config.restore_order:
        # The order the algorithm chose, in the columns that the tile's tokens take.
        by_column = at.argsort()
        at = at[by_column[tile[shown][by_column].argsort(stable=True)]]
    slots = torch.zeros_like(flat, dtype=torch.bool).index_fill(0, at, True)
    return _Places(slots.view_as(place), shown[at.argsort()], sizes, positions)


def _numbered(per_tile: list[Tensor], counts: list[int]) -> Tensor:
    """Indices into the tokens of each tile as indices into those of all tiles."""
    ends = torch.tensor(counts).cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    return torch.cat([index + start for index, start in zip(per_tile, starts, strict=True)])


def _live(layout: Layout, slots: Tensor) -> Tensor:
    """Separators, without those behind a row of patches in which no token is left: [B, L] bool."""

    def since_last(columns: Tensor) -> Tensor:
        seen = columns.long().cumsum(1)
        at_newlines = (seen * layout.newline).cummax(1).values
        return seen - torch.nn.functional.pad(at_newlines, (1, -1))

    # A very thin picture has rows without any patch, which the package separates all the same.
    emptied = (since_last(slots) == 0) & (since_last(layout.patch >= 0) > 0)
    return layout.newline & ~emptied


def _embedded(
    model: Any,
    input_ids: Tensor,
    layout: Layout,
    moves: Compaction,
    slots: Tensor,
    features: Tensor,
) -> Tensor:
    """[B, S, C]: words, separators, visual tokens, and zeros for padding as the package has it."""
    core = model.get_model()
    words = moves.take(_at_columns(input_ids, layout.text, 0), 0)
    embeds: Tensor = core.embed_tokens(words)
    device = embeds.device
    is_word = moves.take(layout.text >= 0, False).to(device)
    embeds = embeds.masked_fill(~is_word[..., None], 0.0)
    if getattr(core, "image_newline", None) is not None:
        is_newline = moves.take(layout.newline, False).to(device)
        embeds = torch.where(is_newline[..., None], core.image_newline.to(embeds), embeds)
    where = moves.take(slots, False).to(device)
    return embeds.masked_scatter(where[..., None], features.to(embeds))


def _at_columns(values: Tensor, text: Tensor, fill: int) -> Tensor:
    """[B, T] values of a prompt's columns at [B, L] columns of its layout."""
    text = text.to(values.device)
    return values.gather(1, text.clamp(min=0)).masked_fill(text < 0, fill)


def _mask(given: Tensor | None, moves: Compaction) -> Tensor | None:
    if given is not None:
        return moves.valid.to(given)
    return None if bool(moves.valid.all()) else moves.valid.long()


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
    """Columns of padding behind a row repeat its last position, from which decoding counts on."""
    columns = torch.arange(valid.shape[1], device=valid.device)
    last = (columns * valid).amax(1, keepdim=True)
    return positions.where(valid | (columns < last), positions.gather(1, last))
