"""Which output token every patch of an image went into, and which part of it the tower sees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import nn

from ...loading.images import load_image
from ...merge.merge_pass import MergePass
from ...wrapping.wrap import merging_of

Box = tuple[float, float, float, float]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True, eq=False)
class SourceMap:
    """The groups of one image's patches.

    Attributes:
        groups: [rows, columns] int64, the output token every patch went into.
        tokens: visual tokens that reach the language model, a kept CLS included.
        seen: [rows, columns] bool, False for patches that were dropped instead of averaged
            (selection and pruning); None means all are seen.
        box: the part of the image that the patches cover (left, upper, right, lower), as
            fractions of its width and height; outside of 0..1 where the processor pads.

    Raises:
        ValueError: shapes or token numbers that do not fit together.
    """

    groups: npt.NDArray[np.int64]
    tokens: int
    seen: npt.NDArray[np.bool_] | None = None
    box: Box = field(default=WHOLE)

    def __post_init__(self) -> None:
        if self.groups.ndim != 2 or self.groups.size == 0:
            raise ValueError(f"groups must be [rows, columns], got shape {self.groups.shape}")
        if not 0 <= self.groups.min() <= self.groups.max() < self.tokens:
            raise ValueError(
                f"groups must name tokens 0..{self.tokens - 1}, got "
                f"{self.groups.min()}..{self.groups.max()}"
            )
        if self.seen is not None and self.seen.shape != self.groups.shape:
            raise ValueError(
                f"seen must have the shape of groups, {self.groups.shape}, got {self.seen.shape}"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        rows, columns = self.groups.shape
        return rows, columns

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """[tokens] int64, number of patches in every token; 0 for a CLS token."""
        return np.bincount(self.groups.ravel(), minlength=self.tokens)


def source_map(model: nn.Module, processor: Any, image: Image.Image) -> SourceMap:
    """Run the vision tower of a wrapped model on one image and read its groups.

    Args:
        model: a wrapped model.
        processor: the model's processor, or its image processor.
        image: an image of any size and mode.

    Raises:
        ValueError: the model is not wrapped, its tokens form no grid, or its images have grids of
            their own (`source_maps`).
    """
    base, merging = merging_of(model)
    shape = merging.adapter.tower_shape(base)
    if shape.packed:
        raise ValueError(
            f"an image of a {type(base).__name__} has no square grid of one size; source_maps "
            "gives the grids of such images"
        )
    if shape.grid is None:
        raise ValueError(
            f"the {shape.n_tokens} visual tokens of this model form no grid, so they cannot be "
            "drawn on an image"
        )
    image = load_image(image)
    image_processor = getattr(processor, "image_processor", processor)
    pixels = _pixel_values(image_processor, image)
    plan = merging.plan(base, {"pixel_values": pixels})
    shape, merge_pass = plan.shape, plan.new_pass()
    assert shape.grid is not None
    weight = next(base.parameters())
    with torch.no_grad():
        pixels = pixels.to(weight.device, getattr(base, "dtype", weight.dtype))
        encoded = merging.adapter.encode(base, {"pixel_values": pixels}, merge_pass)
    visual = encoded[0].visual
    groups = visual.source_maps[0][shape.leading_kept :].cpu().numpy().reshape(shape.grid)
    return SourceMap(
        groups=groups,
        tokens=visual.counts[0],
        seen=_seen_patches(merge_pass, shape.grid),
        box=seen_region(image_processor, image.size),
    )


def _pixel_values(image_processor: Any, image: Image.Image) -> torch.Tensor:
    """[1, 3, H, W]."""
    pixels: torch.Tensor = image_processor(images=image, return_tensors="pt")["pixel_values"]
    if pixels.dim() != 4 or len(pixels) != 1:
        raise ValueError(
            f"one image must become one tile, got pixel values of shape {tuple(pixels.shape)}"
        )
    return pixels


def _seen_patches(merge_pass: MergePass, grid: tuple[int, int]) -> npt.NDArray[np.bool_] | None:
    """Patches whose content is part of some output token, None where all of them are."""
    schedule = merge_pass.schedule
    tower = [merge_pass.plans[layer] for layer in sorted(merge_pass.plans)]
    plans = [*tower, *merge_pass.projector_plans]
    if not any(plan.prune or plan.dropped is not None for plan in plans):
        return None
    token = torch.arange(schedule.n_leading + schedule.n_tokens)
    seen = torch.ones_like(token, dtype=torch.bool)
    n_dropped = schedule.n_leading - schedule.leading_kept
    for step, plan in enumerate(plans):
        if step == len(tower):
            token = token - n_dropped
        # A leading token that is cut off after the tower has no place in the plans after that.
        inside = token.clamp(min=0)
        assign, kept = plan.assign[0].cpu(), plan.kept[0].cpu()
        if plan.prune:
            seen &= kept[assign[inside]] == inside
        if plan.dropped is not None:
            seen &= ~plan.dropped[0].cpu()[inside]
        token = assign[inside]
    return seen[schedule.n_leading :].numpy().reshape(grid)


def seen_region(image_processor: Any, size: tuple[int, int]) -> Box:
    """The part of an image that a Hugging Face image processor hands to the vision tower.

    Args:
        image_processor: resizing, then cropping at the centre or padding to a square.
        size: (width, height) of the image in pixels.

    Returns:
        (left, upper, right, lower) as fractions of width and height.
    """
    width, height = size
    if getattr(image_processor, "do_pad", None) and not getattr(
        image_processor, "do_center_crop", None
    ):
        # LlavaImageProcessor centres the image on a square as large as its longer side.
        side = max(width, height)
        left, upper = (side - width) // 2, (side - height) // 2
        return _fractions((-left, -upper, side - left, side - upper), size)
    if not getattr(image_processor, "do_center_crop", None):
        return WHOLE
    crop = _sides(image_processor.crop_size)
    if crop is None:
        return WHOLE
    resized = _resized(image_processor, width, height)
    # Whole pixels, rounded as processors do.
    left, upper = ((side - own) // 2 for side, own in zip(resized, crop, strict=True))
    return _fractions((left, upper, left + crop[0], upper + crop[1]), resized)


def _fractions(edges: tuple[int, int, int, int], size: tuple[int, int]) -> Box:
    """Pixels as fractions of a width and height."""
    left, upper, right, lower = edges
    width, height = size
    return left / width, upper / height, right / width, lower / height


def _resized(image_processor: Any, width: int, height: int) -> tuple[int, int]:
    if not getattr(image_processor, "do_resize", True):
        return width, height
    size = image_processor.size
    shortest = _get(size, "shortest_edge")
    if shortest:
        # As whole numbers: 96 / 90 * 90 may be less than 96.
        short = min(width, height)
        return shortest * width // short, shortest * height // short
    return _sides(size) or (width, height)


def _sides(size: Any) -> tuple[int, int] | None:
    width, height = _get(size, "width"), _get(size, "height")
    return (width, height) if width and height else None


def _get(size: Any, name: str) -> int | None:
    """A side from a dict (transformers 4) or a SizeDict (transformers 5)."""
    value = size.get(name) if isinstance(size, Mapping) else getattr(size, name, None)
    return None if value is None else int(value)
