"""The parts of towers that pack units of patches: where they are, and what they cost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..merge.counts import Footprint
from ..merge.schedule import Schedule
from .inner_tower import Comparison, tokens_by_layer, weights

BLOCK_PARTS = ("norm1", "norm2", "attn", "mlp")
ATTENTION_PARTS = ("qkv", "proj", "num_heads", "scaling")
TOWER_PARTS = ("merger", "rotary_pos_emb", "spatial_merge_size")
# Counted on their own.
_WITH_LAYERS = ("blocks", "merger", "deepstack_merger_list")


def unit_towers(tower: nn.Module) -> list[nn.Module]:
    """The tower, and a copy of it that peft trains (`modules_to_save`); empty for another kind."""
    return [module for module in tower.modules() if _is_unit_tower(module)]


def _is_unit_tower(module: nn.Module) -> bool:
    # Not by getattr: peft's wrappers hand every name on to what they wrap.
    blocks: Any = module._modules.get("blocks")
    if not isinstance(blocks, nn.ModuleList) or not len(blocks):
        return False
    has = all(hasattr(module, name) for name in TOWER_PARTS)
    has = has and all(hasattr(blocks[0], name) for name in BLOCK_PARTS)
    return has and all(hasattr(blocks[0].attn, name) for name in ATTENTION_PARTS)


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
    """FLOPs of a tower, without comparisons; all windows count as full ones."""
    side, lengths = tower.spatial_merge_size, _lengths(tower, footprint, schedule)
    inside = schedule is None or not schedule.after_layer
    total = 0
    for index, block in enumerate(tower.blocks):
        entering, leaving = lengths[index], lengths[index + 1]
        total += weights(block.attn) * entering * side**2
        total += weights(block.mlp) * (leaving if inside else entering) * side**2
        total += _logits(tower, index, footprint, entering)
    for index, merger in mergers(tower):
        total += weights(merger) * lengths[index]
    rest = ((name, module) for name, module in tower.named_children() if name not in _WITH_LAYERS)
    for name, module in rest:
        seen = lengths[-1] if name == "downsample" else footprint.full * side**2
        total += weights(module) * seen
    return 2 * total


def unit_comparisons(tower: Any, footprint: Footprint, schedule: Schedule) -> list[Comparison]:
    """Units that merging compares, in sets of a frame or window."""
    attention, units = tower.blocks[0].attn, tower.spatial_merge_size**2
    lengths, sets = _lengths(tower, footprint, schedule), _sets(tower, footprint)
    width = attention.qkv.in_features
    widths = width // attention.num_heads, width * units
    return [
        Comparison(
            index,
            -(-lengths[index] // sets),
            -(-lengths[index + 1] // sets),
            sets,
            *widths,
            # Of the two products of an attention the first.
            ranking=_logits(tower, index, footprint, lengths[index]),
        )
        for index, _ in schedule.tower
    ]


def _sets(tower: Any, footprint: Footprint) -> int:
    """Sets of units that are merged on their own: frames, or full windows of frames."""
    frames, window = max(1, footprint.frames), window_side(tower)
    return frames * -(-footprint.full // (frames * window**2)) if window else frames


def _lengths(tower: Any, footprint: Footprint, schedule: Schedule | None) -> list[int]:
    """Units before the first block and after each; one at least is left of every set."""
    fewest = min(footprint.full, _sets(tower, footprint))
    lengths = tokens_by_layer(schedule, footprint, len(tower.blocks))
    return [max(fewest, length) for length in lengths]


def _logits(tower: Any, layer: int, footprint: Footprint, units: int) -> int:
    """FLOPs of one of the two products of a block's attention, whose patches are of `units`."""
    patches, together = tower.spatial_merge_size**2, footprint.full / max(1, footprint.frames)
    if is_windowed(tower, layer):
        together = min(together, window_side(tower) ** 2)
    keys = together * units / footprint.full * patches
    width: int = tower.blocks[layer].attn.qkv.in_features
    found: int = round(2 * units * patches * keys * width)
    return found


def window_side(tower: Any) -> int:
    """Units along a side of a window; 0 where there are none."""
    if getattr(tower, "fullatt_block_indexes", None) is None:
        return 0
    return int(tower.window_size // tower.spatial_merge_size // tower.patch_size)


def is_windowed(tower: Any, layer: int) -> bool:
    """Whether a layer attends within windows."""
    everywhere = getattr(tower, "fullatt_block_indexes", None)
    return everywhere is not None and layer not in everywhere
