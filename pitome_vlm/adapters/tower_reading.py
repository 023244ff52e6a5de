"""How a call of the generic adapter reads a vision tower, and what that costs where none merges."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..merge.counts import Footprint
from .family import Family, vit_tokens
from .grids import Grid
from .inner_tower import Reading
from .tower_tokens import feature_depth, patch_grid

# Words in the names of a tower's modules that see merged patches.
_AFTER_MERGING = ("merger", "downsample", "head_linear")


def depths_read(family: Family, config: Any, inputs: Mapping[str, Any], n: int) -> tuple[int, ...]:
    """Numbers of the layers after which a call reads states.

    Args:
        family: the record.
        config: of the model.
        inputs: of the call.
        n: layers of the tower.

    Raises:
        ValueError: a layer outside of the tower.
    """
    name = "vision_feature_layer"
    if all(name not in own for own in family.inputs.values()):
        return (n,)
    given = inputs.get(name)
    return tuple(feature_depth(getattr(config, name) if given is None else given, n))


def reading_of(
    family: Family, config: Any, inputs: Mapping[str, Any], kind: str, images: int, n: int
) -> Reading:
    """How a call reads a tower in which tokens merge.

    Args:
        family: the record.
        config: of the model.
        inputs: of the call.
        kind: of the images, "image" or "video".
        images: how many there are.
        n: layers of the tower.

    Raises:
        ValueError: inputs do not belong together, or merging cannot respect one.
    """
    pixels, patches = inputs[family.inputs[kind][0]], tuple[Grid, ...]()
    if family.tower_grids is not None:
        patches = tuple(family.tower_grids(config, inputs, kind))
    elif family.tower == "grid":
        patches = ((1, *patch_grid(config.vision_config)),) * images
    row = pixels.shape[1] if pixels.dim() == 3 else 0
    return Reading(depths_read(family, config, inputs, n), patches, row)


def reading_of_one(family: Family, config: Any, footprint: Footprint, n: int) -> Reading:
    """How an image (or one of its tiles) is read of which only the footprint is known."""
    patches = footprint.full
    if family.patches is not None:
        patches *= family.patches(config)
    elif family.tower == "grid":
        patches = math.prod(patch_grid(config.vision_config))
    return Reading(depths_read(family, config, {}, n), ((1, 1, patches),))


def whole_flops(family: Family, tower: nn.Module, config: Any, footprint: Footprint) -> int:
    """FLOPs of a tower that is left alone.

    Patches through all linear layers and convolutions, and attention over every frame.
    """
    if family.patches is not None:
        patches = footprint.full * family.patches(config)
    else:
        has_class = any("cls_token" in name for name, _ in tower.named_parameters())
        patches = vit_tokens(config) + has_class
    total = 0
    for name, module in tower.named_modules():
        seen = footprint.full if any(word in name for word in _AFTER_MERGING) else patches
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)):
            total += 2 * module.weight.numel() * seen
    layers = max(len(m) for m in tower.modules() if isinstance(m, nn.ModuleList))
    frame, vision = patches // max(1, footprint.frames), config.vision_config
    width = int(getattr(vision, "embed_dim", None) or vision.hidden_size)
    return total + 4 * patches * frame * width * layers
