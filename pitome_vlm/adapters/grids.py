"""Images and videos whose tokens lie on a grid of their own: counts, cells and places."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..merge.counts import Footprint
from ..merge.tiles import PackedItem
from ..releases import accepted

# Frames, rows and columns of what is merged with each other.
Grid = tuple[int, int, int]


def footprint_of(grid: Grid, kind: str) -> Footprint:
    """Token counts of one image or video."""
    return Footprint(math.prod(grid), frames=grid[0] if kind == "video" else 0)


def item_of(grid: Grid, kind: str) -> PackedItem:
    """The cells of one image or video, frame by frame."""
    planes = tuple(torch.arange(math.prod(grid)).view(grid))
    frames = tuple(range(grid[0])) if kind == "video" else None
    return PackedItem(footprint_of(grid, kind), planes, frames)


def rope_places(
    model: Any, ids: dict[str, int], inputs: Mapping[str, Any], mask: Tensor | None
) -> Tensor:
    """[B, T, 3] float32: time, row and column of every token of the unmerged prompt.

    Args:
        model: one whose `model.get_rope_index` places tokens.
        ids: the placeholder of every kind, images before videos.
        inputs: of a call, before anything is merged.
        mask: [B, T] over the prompt, or None.

    Raises:
        ValueError: there are no ids in which to find the images.
    """
    given = inputs.get("position_ids")
    if isinstance(given, Tensor):
        own = given if given.dim() == 3 else given.expand(3, *given.shape)
        return own[-3:].permute(1, 2, 0).float()
    tokens = inputs.get("input_ids")
    if tokens is None:
        raise ValueError(
            "input_ids are needed with pixel_values: this model's positions follow from where "
            "its images are in the prompt; pass input_ids, or position_ids of your own"
        )
    kinds = inputs.get("mm_token_type_ids")
    if kinds is None:
        kinds = torch.zeros_like(tokens)
        for number, token in enumerate(ids.values(), start=1):
            kinds = kinds.masked_fill(tokens == token, number)
    names = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    values = {name: inputs.get(name) for name in names}
    values |= {"mm_token_type_ids": kinds, "attention_mask": mask}
    locate = model.model.get_rope_index
    places, _ = locate(tokens, **accepted(locate, values))
    found: Tensor = places.permute(1, 2, 0).float()
    return found
