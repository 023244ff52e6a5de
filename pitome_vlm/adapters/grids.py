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
# The argument that holds a kind's pixels.
PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


def given(inputs: Mapping[str, Any], name: str, kind: str) -> list[Any]:
    """The numbers that a call gives of every image of a kind.

    Raises:
        ValueError: it gives none.
    """
    if inputs.get(name) is None:
        raise ValueError(
            f"{name} is missing: this model needs it for every {kind} with its pixels; pass "
            "everything that the processor returned"
        )
    found: list[Any] = torch.as_tensor(inputs[name]).tolist()
    return found


def given_grids(inputs: Mapping[str, Any], kind: str) -> list[Grid]:
    """Frames, rows and columns of patches of every image, as `{kind}_grid_thw` gives them.

    Raises:
        ValueError: they are missing, or there are pixels of more or fewer patches.
    """
    name, pixels = f"{kind}_grid_thw", inputs.get(PIXELS[kind])
    grids = given(inputs, name, kind)
    patches = sum(math.prod(grid) for grid in grids)
    if isinstance(pixels, Tensor) and len(pixels) != patches:
        raise ValueError(
            f"{PIXELS[kind]} holds {len(pixels)} patches, but {name} describes {patches} (of "
            f"{len(grids)} {kind}s); pass both as the processor returned them"
        )
    return [(t, h, w) for t, h, w in grids]


def footprint_of(grid: Grid, kind: str) -> Footprint:
    """Token counts of one image or video."""
    frames = grid[0] if kind == "video" else 0
    return Footprint(math.prod(grid), frames=frames, rows=grid[1])


def item_of(grid: Grid, kind: str) -> PackedItem:
    """The cells of one image or video, frame by frame."""
    planes = tuple(torch.arange(math.prod(grid)).view(grid))
    frames = tuple(range(grid[0])) if kind == "video" else None
    return PackedItem(footprint_of(grid, kind), planes, frames)


def item_with_gaps(grid: Grid, shown: Tensor, kind: str) -> PackedItem:
    """The cells of a video, some of which the prompt does not show.

    A frame becomes a row of what is left of it, because that is no grid any more.

    Args:
        grid: of all cells.
        shown: [cells] bool.
        kind: of the placeholders.
    """
    counts = [count for count in shown.view(grid[0], -1).sum(1).tolist() if count]
    full = sum(counts)
    if full == len(shown):
        return item_of(grid, kind)
    planes = tuple(part[None] for part in torch.split(torch.arange(full), counts))
    return PackedItem(Footprint(full, frames=len(counts)), planes, tuple(range(len(counts))))


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
        for number, (kind, token) in enumerate(ids.items(), start=1):
            # Kinds may share a placeholder.
            if inputs.get(f"{kind}_grid_thw") is not None:
                kinds = kinds.masked_fill(tokens == token, number)
    if mask is not None:
        # An image takes its places whole, also where a part of it is masked.
        mask = mask.masked_fill(kinds.to(mask.device) != 0, 1)
    names = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    values = {name: inputs.get(name) for name in names}
    values |= {"mm_token_type_ids": kinds, "attention_mask": mask}
    locate = model.model.get_rope_index
    places, _ = locate(tokens, **accepted(locate, values))
    found: Tensor = places.permute(1, 2, 0).float()
    return found
