"""Where the columns of a shortened prompt sit: by the model's rule, the caller's, or by count."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..merge.tokens import VisualTokens
from .columns import Compaction, compact_positions
from .merging import CallPlan
from .positions import Calibration, refuse_shortened, spread_places, unreduced_positions


def prompt_positions(
    plan: CallPlan,
    inputs: dict[str, Any],
    visual: VisualTokens,
    placeholders: Tensor,
    drop: Tensor,
    moves: Compaction,
    slots: Tensor,
    mask: Tensor | None,
    start: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Positions of the shortened prompt, and the caller's own where samples share a row.

    Returns:
        `position_ids`, `last_position` and `packed_positions` of `CompactPrompt`.
    """
    calibration = plan.calibration
    if plan.adapter.own_positions:
        refuse_shortened(placeholders, visual.full_counts)
    places = plan.adapter.prompt_places(plan.model, inputs, mask)
    if plan.adapter.own_positions and places is not None:
        return (*_spread(places, placeholders, visual, calibration, moves, start), None)
    own, packed = inputs.get("position_ids"), None
    if own is not None:
        own = own.expand_as(drop).to(drop.device)
        packed = moves.take(compact_positions(own, drop), 0)
    if calibration.positions == "compact":
        return packed, None, packed
    if places is not None:
        found, last = _spread(places, placeholders, visual, calibration, moves, start)
        return found[..., 0], last, packed
    return (*_layout(calibration, visual, placeholders, moves, slots, mask, own, start), packed)


def _spread(
    places: Tensor,
    placeholders: Tensor,
    visual: VisualTokens,
    calibration: Calibration,
    moves: Compaction,
    start: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """[B, S, D] float32, places of an unreduced prompt for the shortened one; [B] its last one."""
    found = spread_places(places, placeholders, visual.source_maps, visual.anchors, calibration)
    positions, last = moves.take(found, 0.0), places.amax((1, 2)).to(found)
    if start is None:
        return positions, last
    return positions + start[:, None, None], last + start


def _layout(
    calibration: Calibration,
    visual: VisualTokens,
    placeholders: Tensor,
    moves: Compaction,
    slots: Tensor,
    mask: Tensor | None,
    own: Tensor | None,
    start: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """[B, S] float32, positions that leave the text where it was without merging; [B] the last.

    Args:
        calibration: positions other than "compact".
        visual: the visual tokens.
        placeholders: [B, T] bool.
        moves: where the columns went.
        slots: [B, S] bool, the placeholders that stay.
        mask: [B, T] over the new columns, or None.
        own: [B, T] the caller's positions, or None.
        start: position of the first new column where the caller gave none.
    """
    if own is not None and int(placeholders.sum()) != sum(visual.full_counts):
        # Written for the shortened prompt: there is no other layout to point back to.
        return moves.take(own, 0).float(), None
    if own is not None:
        places = own[..., None].float()
        found, last = _spread(places, placeholders, visual, calibration, moves, None)
        return found[..., 0], last
    attended = moves.valid if mask is None else moves.take(mask, 0) != 0
    offsets = torch.cat(visual.positions(calibration.positions))
    return unreduced_positions(
        slots, attended | slots, visual.full_counts, visual.counts, offsets, start
    )
