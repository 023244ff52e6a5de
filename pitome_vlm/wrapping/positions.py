"""Telling a language model how much a merged token stands for and where it sits.

A token of size s counts like s equal tokens when log(s) is added to its attention logit. Size and
position together recover most of what merging loses, each alone hurts. The bias travels as a float
attention mask (`masks.py`) or, for flash kernels, in channels of the keys
(`adapters/wide_attention.py`).

Axes: B rows, S columns of which sizes are known.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.utils import logging

from ..adapters.wide_attention import head_dim
from ..merge.config import MergeConfig, Positions
from ..merge.places import group_places, told
from ..merge.size_channels import WIDEST, channel_width
from ..releases import ADDS_MASK, FLASH

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Calibration:
    """What the language model is told about merged tokens.

    Attributes:
        size_bias: add log(size) to the attention logits of visual keys, in every layer.
        positions: "mean", "median" and "original" leave text where it was without merging and put
            a merged token at the mean or median raster position of its patches, or at that of the
            patch it is named after; "compact" counts the tokens that are left.
        carrier: how log(size) reaches the attention kernels: in a float "mask", or in "channels"
            of wider keys, for kernels that take no such mask.
    """

    size_bias: bool
    positions: Positions
    carrier: Literal["mask", "channels"] = "mask"

    @property
    def is_active(self) -> bool:
        """Whether anything differs from a plain shorter prompt."""
        return self.size_bias or self.positions != "compact"

    def __str__(self) -> str:
        bias = "log-size bias" if self.size_bias else "no size bias"
        if self.size_bias and self.carrier == "channels":
            bias += " (in channels of the keys)"
        return f"{bias}, {self.positions} positions"


def resolve(
    config: MergeConfig, text_config: Any, *, wanted: bool, channels: bool = True
) -> Calibration:
    """The calibration in force for a config on a language model.

    An option that is None follows the other one, because each alone hurts; with both None it is
    on where the algorithm gains by it and the attention implementation can do it.

    Args:
        config: the merge options.
        text_config: configuration of the language model.
        wanted: whether the algorithm is better with calibration (`Algorithm.calibrated`).
        channels: whether the model's forward hands further arguments on to its attention layers.

    Raises:
        ValueError: `size_bias=True` where neither a float mask nor channels can carry it, or on a
            language model without rotary embeddings.
    """
    bias, positions = told(config, wanted=wanted)
    adds_mask = by_mask(text_config)
    asked = config.size_bias is True
    obstacle = None if adds_mask else _no_channels(text_config, channels, asked=asked)
    obstacle = obstacle or _no_places(text_config)
    if bias and obstacle and config.size_bias is None and config.positions is None:
        logger.warning_once(
            f"{obstacle}; merging runs without size bias and positions, which costs accuracy at "
            "small budgets"
        )
        bias, positions = False, "compact"
    if bias and obstacle:
        raise ValueError(
            f"size_bias: {obstacle}; load the model with attn_implementation='sdpa', or pass "
            "size_bias=False, positions='compact'"
        )
    found = Calibration(bias, positions)
    if adds_mask or not channels or not found.is_active:
        return found
    return dataclasses.replace(found, carrier="channels")


def by_mask(text_config: Any) -> bool:
    """Whether a language model's attention kernels add a float mask."""
    return _implementation(text_config) in ADDS_MASK


def _implementation(text_config: Any) -> str:
    return getattr(text_config, "_attn_implementation", None) or "sdpa"


def _no_channels(text_config: Any, channels: bool, *, asked: bool) -> str | None:
    """Why channels of the keys cannot carry log(size) to an attention kernel, None where they can.

    Args:
        text_config: configuration of the language model.
        channels: see `resolve`.
        asked: the size bias was asked for by name, so that a kernel of which nothing is known is
            tried.
    """
    name, width = _implementation(text_config), head_dim(text_config)
    kernel = f"attention implementation {name!r} of the language model"
    cap = getattr(text_config, "attn_logit_softcapping", None)
    if not channels or not (FLASH in name or asked):
        return f"{kernel} adds no float mask ({', '.join(ADDS_MASK)} do)"
    if cap:
        return f"{kernel} would cap log(size) with the logits, at {cap:g}"
    if channel_width(width) > WIDEST:
        return f"{kernel} takes heads of up to {WIDEST} channels, which {width} of the model's fill"
    return None


def _no_places(text_config: Any) -> str | None:
    """Why a language model cannot be told where merged tokens sit, None where it can."""
    names = ("rope_parameters", "rope_theta", "rope_scaling")
    if any(getattr(text_config, name, None) is not None for name in names):
        return None
    return (
        f"the language model ({getattr(text_config, 'model_type', 'unknown')}) has no rotary "
        "positions, which mean positions of merged tokens need"
    )


def unreduced_positions(
    slots: Tensor,
    valid: Tensor,
    full_counts: list[int],
    counts: list[int],
    offsets: Tensor,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Positions of a shortened prompt in the layout it would have had without merging.

    Args:
        slots: [B, S] bool, columns that hold visual tokens; images follow in row order.
        valid: [B, S], 0 where padded. Padding takes no position (as `generate` counts).
        full_counts: tokens every image would have had.
        counts: tokens every image has.
        offsets: [sum of counts], see `VisualTokens.positions`.
        start: [B] position of the first column, None for 0.

    Returns:
        [B, S] float32, where a padded column repeats the position before it; and [B] the last
        position of every row, which its image may cover without a token there.
    """
    device = slots.device
    valid = valid.to(device) != 0
    # An image counts as many positions as it has patches, all of them at its last token, so
    # that its other tokens are placed relative to where it begins.
    room = torch.zeros(len(offsets))
    room[[end - 1 for end in itertools.accumulate(counts)]] = torch.tensor(full_counts).float()
    steps = valid.float().masked_scatter(slots, room.to(device))
    after = steps.cumsum(1)
    before, last = after - steps, after[:, -1] - 1
    moved = torch.zeros_like(steps).masked_scatter(slots, offsets.to(device))
    positions = (before + moved).where(valid, (before - 1).clamp(min=0))
    if start is None:
        return positions, last
    return positions + start.to(device)[:, None], last + start.to(device)


def refuse_shortened(placeholders: Tensor, full_counts: list[int]) -> None:
    """Refuse a prompt that has lost placeholders where places follow from the whole of it.

    Args:
        placeholders: [B, T] bool.
        full_counts: tokens every image would have had.

    Raises:
        ValueError: there are more or fewer.
    """
    found, needed = int(placeholders.sum()), sum(full_counts)
    if found != needed:
        raise ValueError(
            f"the prompt has {found} placeholders where {needed} are needed: this model's "
            "positions follow from the whole prompt; pass it as the processor wrote it"
        )


def spread_places(
    places: Tensor,
    placeholders: Tensor,
    source_maps: list[Tensor],
    anchors: list[Tensor],
    calibration: Calibration,
) -> Tensor:
    """Places of an unreduced prompt with those of merged tokens put in.

    Args:
        places: [B, T, D] of every token, D numbers each.
        placeholders: [B, T] bool; images follow in row order.
        source_maps: per image [n] int64, the token of every placeholder.
        anchors: per image [m] int64, the placeholder every token is named after.
        calibration: positions other than "compact".

    Returns:
        [B, T, D], meaningful at columns that stay.

    Raises:
        ValueError: the placeholders were dropped before, so there is no layout to point back to.
    """
    lengths = [len(source) for source in source_maps]
    refuse_shortened(placeholders, lengths)
    moved = []
    own_places = torch.split(places[placeholders.to(places.device)], lengths)
    for own, source, anchor in zip(own_places, source_maps, anchors, strict=True):
        found = group_places(own, source, anchor, calibration.positions)
        stays = anchor.to(own.device).sort().values
        moved.append(own.index_copy(0, stays, found))
    slots = placeholders.to(places.device)[..., None]
    return places.masked_scatter(slots, torch.cat(moved))


def as_model_positions(positions: Tensor | None) -> Tensor | None:
    """Positions as a model takes them: [B, S] stays, [B, S, D] becomes [D, B, S]."""
    if positions is None or positions.dim() < 3:
        return positions
    return positions.permute(2, 0, 1)


def extended(values: Tensor, length: int, fill: float) -> Tensor:
    """[B, S] to [B, length], `fill` after what is known, cut where it is longer."""
    missing = length - values.shape[1]
    if missing <= 0:
        return values[:, :length]
    return torch.nn.functional.pad(values, (0, missing), value=fill)


def later_positions(
    positions: Tensor,
    mask: Tensor | None,
    length: int,
    last: Tensor | None = None,
    wanted: int | None = None,
) -> Tensor:
    """Positions of a prompt and of what comes after it: [B, S] to [B, length].

    Args:
        positions: [B, S] of the prompt, of any dtype, or [B, S, D].
        mask: [B, length], 0 where padded, None for no padding.
        length: columns wanted; those after the prompt count on from its end.
        last: [B] the position at its end; None for that of its last column.
        wanted: only so many of the last columns; None for all.
    """
    more = length - positions.shape[1]
    wanted = length if wanted is None else wanted
    if more <= 0:
        return positions[:, length - wanted : length]
    if mask is None:
        steps = torch.ones(len(positions), more, device=positions.device)
    else:
        steps = mask[:, -more:] != 0
    steps = steps.to(positions).cumsum(1)
    end = positions[:, -1:]
    if last is not None:
        end = last.to(positions)[:, None]
    if positions.dim() == 3:
        steps, end = steps[..., None], end.view(*end.shape[:2], -1)
    later = end + steps
    if wanted <= more:
        later = later[:, more - wanted :]
        return later if positions.dim() < 3 else later.expand(-1, -1, positions.shape[-1])
    if positions.dim() == 3:
        later = later.expand(-1, -1, positions.shape[-1])
    return torch.cat([positions, later], 1)[:, length - wanted :]
