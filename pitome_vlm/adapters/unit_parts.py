"""The parts of towers that pack units of patches: where they are, and what they cost."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..merge.counts import Footprint, TokenCount
from ..merge.schedule import Schedule
from ..merge.segments import Frame
from .inner_tower import Comparison, weights
from .unit_attention import KERNELS

BLOCK_PARTS = ("norm1", "norm2", "attn", "mlp")
TOWER_PARTS = ("merger", "rotary_pos_emb", "spatial_merge_size")
# Counted on their own.
_WITH_LAYERS = ("blocks", "merger", "deepstack_merger_list")


def unit_towers(
    tower: nn.Module, attention_parts: tuple[str, ...] = KERNELS.parts
) -> list[nn.Module]:
    """The tower, and a copy of it that peft trains (`modules_to_save`); empty for another kind."""
    return [module for module in tower.modules() if _is_unit_tower(module, attention_parts)]


def _is_unit_tower(module: nn.Module, attention_parts: tuple[str, ...]) -> bool:
    # Not by getattr: peft's wrappers hand every name on to what they wrap.
    blocks: Any = module._modules.get("blocks")
    if not isinstance(blocks, nn.ModuleList) or not len(blocks):
        return False
    has = all(hasattr(module, name) for name in TOWER_PARTS)
    has = has and all(hasattr(blocks[0], name) for name in BLOCK_PARTS)
    return has and all(hasattr(blocks[0].attn, name) for name in attention_parts)


def mergers(tower: Any) -> Iterator[tuple[int, nn.Module]]:
    """Every patch merger of a tower and the number of blocks before it."""
    yield len(tower.blocks), tower.merger
    levels = zip(
        getattr(tower, "deepstack_visual_indexes", ()),
        getattr(tower, "deepstack_merger_list", ()),
        strict=True,
    )
    for layer, merger in levels:
        yield layer + 1, merger


def unit_flops(tower: Any, footprint: Footprint, schedule: Schedule | None) -> int:
    """FLOPs of a tower, without comparisons."""
    side, frames = tower.spatial_merge_size, max(1, footprint.frames)
    windows = _windows_by_layer(tower, footprint, schedule)
    units = [frames * sum(own) for own in windows]
    inside = schedule is None or not schedule.after_layer
    total = 0
    for index, block in enumerate(tower.blocks):
        total += weights(block.attn) * units[index] * side**2
        total += weights(block.mlp) * units[index + inside] * side**2
        total += frames * _logits(tower, index, windows[index])
    for index, merger in mergers(tower):
        total += weights(merger) * units[index]
    rest = ((name, module) for name, module in tower.named_children() if name not in _WITH_LAYERS)
    for name, module in rest:
        seen = units[-1] if name == "downsample" else footprint.full * side**2
        total += weights(module) * seen
    return 2 * total


def unit_comparisons(tower: Any, footprint: Footprint, schedule: Schedule) -> list[Comparison]:
    """Units that merging compares, in sets of a frame or window."""
    attention, patches = tower.blocks[0].attn, tower.spatial_merge_size**2
    windows, frames = _windows_by_layer(tower, footprint, schedule), max(1, footprint.frames)
    width, found = attention.qkv.in_features, []
    widths = width // attention.num_heads, width * patches
    for index, _ in schedule.tower:
        # Of the two products of an attention the first.
        ranking = frames * _logits(tower, index, windows[index])
        sets = Counter(zip(windows[index], windows[index + 1], strict=True))
        for (entering, leaving), times in sets.items():
            own = Comparison(index, entering, leaving, times * frames, *widths, ranking)
            found.append(own)
            ranking = 0
    return found


def _windows_by_layer(
    tower: Any, footprint: Footprint, schedule: Schedule | None
) -> list[tuple[int, ...]]:
    """Units of the windows of a frame before the first block and after each."""
    frame = Frame(_windows(tower, footprint), TokenCount(footprint.full, footprint.full))
    counts = {} if schedule is None else dict(schedule.tower)
    found = [frame.parts]
    for layer in range(len(tower.blocks)):
        left = found[-1]
        if schedule is not None and layer in counts:
            count = -(-footprint.full * counts[layer] // schedule.n_tokens)
            left = frame.left(left, count)
        found.append(left)
    return found


def _windows(tower: Any, footprint: Footprint) -> tuple[int, ...]:
    """Units of every window of a frame, or of the whole where there are no windows."""
    side, units = window_side(tower), footprint.full // max(1, footprint.frames)
    if not side:
        return (units,)
    # A row of units, where the grid is not known.
    rows = footprint.rows or 1
    cuts = (_cut(length, side) for length in (rows, units // rows))
    return tuple(high * wide for high, wide in itertools.product(*cuts))


def _cut(length: int, side: int) -> list[int]:
    """A length in pieces of `side`, of which the last may be shorter."""
    return [min(side, length - start) for start in range(0, length, side)]


def _logits(tower: Any, layer: int, windows: tuple[int, ...]) -> int:
    """FLOPs of one of the two products of a block's attention within a frame."""
    patches: int = tower.spatial_merge_size**2
    segments = windows if is_windowed(tower, layer) else (sum(windows),)
    width: int = tower.blocks[layer].attn.qkv.in_features
    return sum(2 * (units * patches) ** 2 * width for units in segments)


def window_side(tower: Any) -> int:
    """Units along a side of a window; 0 where there are none."""
    if getattr(tower, "fullatt_block_indexes", None) is None:
        return 0
    return int(tower.window_size // tower.spatial_merge_size // tower.patch_size)


def is_windowed(tower: Any, layer: int) -> bool:
    """Whether a layer attends within windows."""
    everywhere = getattr(tower, "fullatt_block_indexes", None)
    return everywhere is not None and layer not in everywhere
