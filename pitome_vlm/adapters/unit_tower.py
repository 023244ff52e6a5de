"""Merging by units of 2x2 patches inside the towers of Qwen2-VL and its relatives.

These towers pack images of any size into one sequence in which the patches of a unit (what the
patch merger makes one token of) are neighbours. Whole units merge: a merged one is again 2x2
patches, each the mean of its members' patches in the same corner, with the mean of their rotary
places. The patch merger therefore runs on the units that are left, and hands its output to every
unit that they stand for. Where a tower attends within windows, units merge within windows.

Axes: S patches of the sequence, U units, H heads, D channels of a head, C of the tower.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from ..merge.counts import Footprint
from ..merge.merge_pass import MergePass
from ..merge.schedule import Schedule
from ..merge.segments import Frame, SegmentPass
from ..merge.tiles import CellGroups, PackedItem
from .inner_tower import Comparison, Reading, TowerKind
from .swap import own_forward, swap_in
from .tower import InTower, TowerSlot, encoding, refuse_checkpoint_wrapper, uninstall_tower
from .unit_attention import KERNELS, Segmented, UnitKernels, attention_by_unit
from .unit_parts import (
    is_windowed,
    mergers,
    unit_comparisons,
    unit_flops,
    unit_towers,
    window_side,
)


@dataclass
class UnitPass(SegmentPass):
    """A pass over the units of packed images; places are those of the patches, [1, U, patches x 2].

    Attributes:
        patches: of a unit.
        rotary: the tower's rotary embedding.
        order: [U] int64, the cell that stands at every place of the sequence; None for its own.
        unit_kernels: how attention is run.
    """

    patches: int = 4
    rotary: Any = None
    order: Tensor | None = None
    unit_kernels: UnitKernels = KERNELS
    _angles: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _segments: dict[tuple[int, bool], Segmented] = field(default_factory=dict)

    def angles_before(self, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the patches that enter a layer, each [S, D]."""
        merged = self.last_merge(layer)
        if merged not in self._angles:
            places = self.places_before(layer).reshape(-1, 2)
            places = places.to(hidden.device)
            self._angles[merged] = self.unit_kernels.angles(self.rotary, hidden, places)
        return self._angles[merged]

    def bias_before(self, layer: int, hidden: Tensor) -> Tensor | None:
        """log(size) of the patches that enter a layer, [S] float32 or wider; None for nothing."""
        exact = torch.promote_types(hidden.dtype, torch.float32)
        bias = self.attention_bias(layer, exact)
        return None if bias is None else bias.flatten().repeat_interleave(self.patches)

    def segments_before(self, layer: int, windowed: bool, device: torch.device) -> Segmented:
        """Which patches that enter a layer attend to each other: those of a window or frame."""
        key = self.last_merge(layer), windowed
        if key not in self._segments:
            lengths = self.lengths_before(layer)
            units = lengths.parts if windowed else lengths.frames
            self._segments[key] = Segmented.of([n * self.patches for n in units], device)
        return self._segments[key]


class UnitBlock(InTower):
    """Mixin before a block's class; its own forward runs until something is merged."""

    _pitome_windowed: bool

    def forward(
        self, hidden_states: Tensor, *args: Any, pitome_pass: UnitPass | None = None, **kwargs: Any
    ) -> Tensor:
        """The block, with a merge between attention and MLP (paper eq. 1-2) where scheduled.

        Args:
            hidden_states: [S, C], or [S, 1, C] as vLLM has them.
            *args: what the tower passes to its blocks.
            pitome_pass: the encoding this call belongs to.
            **kwargs: what the tower passes to its blocks.
        """
        if pitome_pass is None or not pitome_pass.touches(self._pitome_layer):
            found: Tensor = own_forward(self, UnitBlock)(hidden_states, *args, **kwargs)
            return found
        flat = hidden_states.flatten(0, -2)
        merged = _merged_block(self, self._pitome_layer, flat, pitome_pass)
        return merged.view(-1, *hidden_states.shape[1:])


class UnitMerger(InTower):
    """Mixin before a patch merger's class, which hands its output to all units of a group."""

    def forward(
        self, hidden: Tensor, *args: Any, pitome_pass: UnitPass | None = None, **kwargs: Any
    ) -> Tensor:
        """The merger on the units that are left; [U, C'] of all units that there were.

        Args:
            hidden: what the tower passes.
            *args: the same.
            pitome_pass: the encoding this call belongs to.
            **kwargs: what the tower passes.
        """
        merged: Tensor = own_forward(self, UnitMerger)(hidden, *args, **kwargs)
        source = None if pitome_pass is None else pitome_pass.source_before(self._pitome_layer)
        return merged if source is None else merged[source]


def _merged_block(block: Any, layer: int, hidden: Tensor, merge_pass: UnitPass) -> Tensor:
    """A block with its merge, from the live modules: [S, C] to [S', C]."""
    segments = merge_pass.segments_before(layer, block._pitome_windowed, hidden.device)
    bias, kernels = merge_pass.bias_before(layer, hidden), merge_pass.unit_kernels
    angles = merge_pass.angles_before(layer, hidden)
    heads = kernels.project(block.attn, block.norm1(hidden), *angles)
    hidden = hidden + kernels.attend(block.attn, heads, segments, bias)
    received = None
    if merge_pass.wants_attention(layer):
        scale, patches = kernels.scale(block.attn), merge_pass.patches
        received = attention_by_unit(heads, segments, bias, scale, patches)
        received = kernels.agree(received)
    if merge_pass.config.placement == "after_attention":
        hidden = _merge(layer, hidden, heads[1], received, merge_pass)
    hidden = hidden + block.mlp(block.norm2(hidden))
    if merge_pass.config.placement == "after_layer":
        hidden = _merge(layer, hidden, heads[1], received, merge_pass)
    return hidden


def _merge(
    layer: int, hidden: Tensor, key: Tensor, received: Tensor | None, merge_pass: UnitPass
) -> Tensor:
    """Units merged where the layer is to merge: [S, C] to [S', C], by keys [S, H, D] or states."""
    units = hidden.view(1, len(hidden) // merge_pass.patches, -1)
    metric = units
    if merge_pass.compares_keys:
        metric = key.mean(1).view(1, units.shape[1], merge_pass.patches, -1).mean(2)
    if merge_pass.merges(layer):
        metric = merge_pass.unit_kernels.agree(metric)
    merged = merge_pass.merge_in_layer(layer, units, metric, received)
    return merged.reshape(-1, hidden.shape[-1])


class UnitTower(TowerKind):
    """Towers of Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen3.5 and GLM-4V."""

    def __init__(self, kernels: UnitKernels = KERNELS) -> None:
        """Run the attention of the towers of transformers, or of those with other `kernels`."""
        self._kernels = kernels

    def _towers(self, tower: nn.Module) -> list[nn.Module]:
        return unit_towers(tower, self._kernels.parts)

    @override
    def layers(self, tower: nn.Module) -> int:
        found: Any = self._towers(tower)
        return len(found[0].blocks) if found else 0

    @override
    def install(self, tower: nn.Module) -> None:
        slot, towers = TowerSlot(), self._towers(tower)
        refuse_checkpoint_wrapper([one.blocks for one in towers])  # type: ignore[misc]
        try:
            for one in towers:
                _install(one, slot)
        except BaseException:
            uninstall_tower(tower)
            raise

    @override
    def uninstall(self, tower: nn.Module) -> None:
        uninstall_tower(tower)

    @override
    @contextlib.contextmanager
    def encoding(
        self,
        tower: nn.Module,
        merge_pass: MergePass,
        items: Sequence[PackedItem],
        reading: Reading,
    ) -> Iterator[MergePass]:
        if not merge_pass.schedule.tower:
            yield merge_pass
            return
        unit_pass = _unit_pass(self._towers(tower)[0], merge_pass, items, self._kernels)
        with encoding(tower, unit_pass):
            yield unit_pass

    @override
    def groups(self, merge_pass: MergePass, items: Sequence[PackedItem]) -> list[CellGroups] | None:
        if not isinstance(merge_pass, UnitPass):
            return None
        layers = merge_pass.schedule.used_layers
        source, named = merge_pass.source_before(layers), merge_pass.named_before(layers)
        assert source is not None
        assert named is not None
        if merge_pass.order is not None:
            order = merge_pass.order.to(source.device)
            source, named = torch.empty_like(source).scatter(0, order, source), order[named]
        anchors = torch.zeros_like(source, dtype=torch.bool).scatter(0, named, True)
        lengths = [item.footprint.full for item in items]
        pairs = zip(torch.split(source, lengths), torch.split(anchors, lengths), strict=True)
        return [CellGroups(*pair) for pair in pairs]

    @override
    def flops(
        self, tower: nn.Module, reading: Reading, footprint: Footprint, schedule: Schedule | None
    ) -> int | None:
        return unit_flops(self._towers(tower)[0], footprint, schedule)

    @override
    def comparisons(
        self, tower: nn.Module, reading: Reading, footprint: Footprint, schedule: Schedule
    ) -> list[Comparison]:
        return unit_comparisons(self._towers(tower)[0], footprint, schedule)


def _unit_pass(
    tower: Any, merge_pass: MergePass, items: Sequence[PackedItem], kernels: UnitKernels
) -> UnitPass:
    """A pass over the frames of images, in the order in which a tower packs their units."""
    side, window = tower.spatial_merge_size, window_side(tower)
    frames, order, places, start = [], [], [], 0
    for item in items:
        count = merge_pass.count(item.footprint)
        for canvas in item.canvases:
            own, parts = _packed(canvas.shape[0], canvas.shape[1], window)
            frames.append(Frame(parts, count))
            order.append(own + start)
            places.append(_patch_places(own, canvas.shape[1], side))
            start += len(own)
    return UnitPass.of(
        merge_pass,
        frames=tuple(frames),
        places=torch.cat(places)[None],
        patches=side**2,
        rotary=tower.rotary_pos_emb,
        order=torch.cat(order) if window else None,
        unit_kernels=kernels,
    )


def _packed(rows: int, columns: int, window: int) -> tuple[Tensor, tuple[int, ...]]:
    """The units of a frame window by window, [U] int64, and how many every window has."""
    if not window:
        return torch.arange(rows * columns), (rows * columns,)
    across = -(-columns // window)
    number = torch.arange(rows)[:, None] // window * across + torch.arange(columns) // window
    return number.flatten().argsort(stable=True), tuple(torch.bincount(number.flatten()).tolist())


def _patch_places(units: Tensor, columns: int, side: int) -> Tensor:
    """Rows and columns of the patches of units, [U, side x side x 2] float32."""
    corners = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    first = torch.stack([units // columns, units % columns], -1) * side
    return (first[:, None] + corners).flatten(1).float()


def _install(tower: Any, slot: TowerSlot) -> None:
    for index, block in enumerate(tower.blocks):
        swap_in(block, UnitBlock)
        block._pitome_windowed = is_windowed(tower, index)
        _place(block, index, slot)
    for index, merger in mergers(tower):
        swap_in(merger, UnitMerger)
        _place(merger, index, slot)


def _place(module: Any, layer: int, slot: TowerSlot) -> None:
    module._pitome_layer = layer
    # In a tuple, so that torch neither registers nor moves it.
    module._pitome_slot = (slot,)
