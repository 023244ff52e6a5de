"""The grids of an image whose tokens are not one square grid: any size, or several tiles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ...loading.image_processors import processed
from ...loading.images import load_image
from ...merge.algorithm import make_plan
from ...merge.merge_pass import MergePass
from ...merge.tokens import VisualTokens
from ...wrapping.wrap import merging_of
from .sources import SourceMap, source_map

# Mean difference, of 255, up to which an image counts as stretched only: ways of resizing differ by
# less, a crop or padding by more.
STRETCHED = 8.0


@dataclass(frozen=True, eq=False)
class Part:
    """A grid of an image.

    Attributes:
        title: which part of the image it is; empty for all of it.
        image: what its patches cover (`SourceMap.box`).
        groups: of its patches. Its tokens are those of everything that is merged together.
    """

    title: str
    image: Image.Image
    groups: SourceMap


def source_maps(model: nn.Module, processor: Any, image: Image.Image) -> list[Part]:
    """Encode one image with a wrapped model and read the groups of every grid it becomes.

    Args:
        model: a wrapped model.
        processor: the model's processor, or its image processor.
        image: an image of any size and mode.

    Returns:
        One grid for models that take an image whole; the overview and the tiles side by side for
        those that pack tiles; every tile, as the tower sees it, for those that merge each on its
        own.

    Raises:
        ValueError: the model is not wrapped, its tokens form no grid, or the processor cuts images
            in a way of which nothing is known here.
    """
    found, merging = merging_of(model)
    base: Any = found
    image = load_image(image)
    shape = merging.adapter.tower_shape(base)
    if not shape.packed:
        return [Part("", image, source_map(model, processor, image))]
    made = processed(processor, base.config.model_type, [[image]])
    given = {name: made[name] for name in merging.adapter.vision_inputs if name in made}
    merge_pass = merging.plan(base).new_pass()
    planes = merging.adapter.image_planes(base, given)
    weight = next(base.parameters())
    with torch.no_grad():
        given = {
            name: value.to(weight.device, weight.dtype if value.is_floating_point() else None)
            for name, value in given.items()
        }
        visual = merging.adapter.encode(base, given, merge_pass)[0].visual
    images = _shown(image, made, processor, [len(own) for own in planes])
    drops = _drops(merge_pass)
    parts = []
    for index, own in enumerate(planes):
        titles = [f"tile {index + 1}"] if len(planes) > 1 else [""]
        if len(own) > 1:
            titles = ["overview", "tiles"]
        for title, plane in zip(titles, own, strict=True):
            groups = _groups(visual, index, plane, drops=drops)
            parts.append(Part(title, images[index], groups))
    return parts


def _groups(visual: VisualTokens, index: int, plane: Tensor, *, drops: bool) -> SourceMap:
    """Of one plane [rows, columns] of one image."""
    seen = None
    if drops:
        named = torch.zeros(visual.full_counts[index], dtype=torch.bool)
        named[visual.anchors[index].cpu()] = True
        seen = named[plane].numpy()
    return SourceMap(visual.source_maps[index].cpu()[plane].numpy(), visual.counts[index], seen)


def _drops(merge_pass: MergePass) -> bool:
    """Whether a token stands for the patch that it is named after and drops the others."""
    algorithm = merge_pass.finisher or merge_pass.algorithm
    if algorithm.needs_grid or algorithm.needs_attention:
        return False
    features = torch.linspace(0, 1, 32).view(1, 8, 4)
    return make_plan(algorithm, features, 6, ctx=merge_pass.projector_context(0)).prune


def _shown(
    image: Image.Image, made: Mapping[str, Any], processor: Any, planes: list[int]
) -> list[Image.Image]:
    """What the planes of every tile are drawn on; `planes` counts them.

    The image itself, sharp and undistorted, where the tower sees all of it; else what it sees.
    """
    if len(planes) > 1:
        return _tiles(made, processor, len(planes))
    pixels = made.get("pixel_values")
    # One that comes as patches, or as an overview with tiles, is seen whole.
    if planes != [1] or pixels is None or pixels.dim() < 4 or pixels.shape[-3] != 3:
        return [image]
    if pixels.shape[:-3].numel() != 1:
        return [image]
    (seen,) = _tiles(made, processor, 1)
    whole = image.convert("RGB").resize(seen.size, Image.Resampling.BICUBIC)
    difference = np.abs(np.asarray(seen, np.float32) - np.asarray(whole, np.float32)).mean()
    return [image if difference < STRETCHED else seen]


def _tiles(made: Mapping[str, Any], processor: Any, count: int) -> list[Image.Image]:
    """The tiles as images, normalisation undone.

    Raises:
        ValueError: the pixels are no images of so many tiles.
    """
    pixels = made["pixel_values"]
    if pixels.shape[-3] != 3 or pixels.shape[:-3].numel() != count:
        raise ValueError(
            f"pixel_values of shape {list(pixels.shape)} are no images of {count} tiles, which "
            "therefore cannot be drawn; take a smaller image, which is one tile"
        )
    prepare = getattr(processor, "image_processor", processor)
    tiles = pixels.float().view(count, *pixels.shape[-3:]).permute(0, 2, 3, 1).numpy()
    if getattr(prepare, "do_normalize", True):
        mean, deviation = (np.float32(getattr(prepare, f"image_{n}")) for n in ("mean", "std"))
        tiles = tiles * deviation + mean
    return [Image.fromarray((255 * tile).round().clip(0, 255).astype(np.uint8)) for tile in tiles]
