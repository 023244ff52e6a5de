"""Noise in the form in which the processors of the generic adapter's families hand over images."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .family import Family
from .grids import Grid


def random_pixels(
    family: Family, model: Any, grid: Grid, counts: tuple[int, int], generator: torch.Generator
) -> dict[str, Tensor]:
    """Pixels and what says how large the images are, on the CPU.

    Args:
        family: the record of the model.
        model: the model.
        grid: of every image.
        counts: rows of the prompt, and images of all rows together.
        generator: draws the pixels.

    Raises:
        TypeError: inputs of this family cannot be made up.
    """
    names, vision = family.inputs["image"], model.config.vision_config
    rows, n_images = counts
    if "image_grid_thw" in names and hasattr(vision, "temporal_patch_size"):
        return _patches(vision, _side(family, model), [grid] * n_images, generator)
    if "image_sizes" in names:
        cell = _side(family, model) * vision.patch_size
        shape = grid[1] * cell, grid[2] * cell
        values = torch.randn(n_images, 3, *shape, generator=generator)
        return {"pixel_values": values, "image_sizes": torch.tensor([shape] * n_images)}
    if family.cells is None:
        return _tiles(family, model, rows, n_images, generator)
    raise TypeError(f"inputs of a {type(model).__name__} cannot be made up; pass your own")


def _side(family: Family, model: Any) -> int:
    """Patches along a side of a token."""
    assert family.patches is not None
    return math.isqrt(family.patches(model.config))


def _patches(
    vision: Any, side: int, grids: list[Grid], generator: torch.Generator
) -> dict[str, Tensor]:
    """Rows of patches and the grid of every image, as Qwen's processors make them."""
    patches = [(t, rows * side, columns * side) for t, rows, columns in grids]
    channels = getattr(vision, "in_channels", 3)
    width = channels * vision.temporal_patch_size * vision.patch_size**2
    count = sum(math.prod(grid) for grid in patches)
    values = torch.randn(count, width, generator=generator)
    return {"pixel_values": values, "image_grid_thw": torch.tensor(patches)}


def _tiles(
    family: Family, model: Any, rows: int, n_images: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """One tile for every image, row by row where the family wants it so."""
    given = model.config.vision_config.image_size
    sides = (given, given) if isinstance(given, int) else tuple(given)
    values = torch.randn(n_images, 3, *sides, generator=generator)
    name = family.inputs["image"][0]
    if len(family.grids(model.config, {name: values}, "image")) != n_images:
        values = values.view(rows, n_images // rows, *values.shape[1:])
    return {name: values}
