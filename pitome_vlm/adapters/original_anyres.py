"""Models of the original llava package whose images are cut into tiles (LLaVA-1.6)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from ..merge.counts import Footprint
from ..merge.merge_pass import MergePass
from ..merge.schedule import TowerShape
from ..merge.tiles import PackedItem, merge_packed
from ..merge.tokens import Encoded
from .features import check_count, shape_of_tile, tile_canvases
from .original_code import PLACEHOLDER, PREPARE, ImageBatch, image_batch, own_function, pack
from .original_llava import OriginalLlavaAdapter, is_original, is_spatial, tower_features

GRID_FUNCTION = "get_anyres_image_grid_shape"


class OriginalAnyResAdapter(OriginalLlavaAdapter):
    """The same models with mm_patch_merge_type "spatial" or "spatial_unpad".

    The numbers of `tower_shape` are those of one tile; `image_sizes` are (width, height).
    """

    counted_per = "tile"
    # A photo.
    default_image_size: tuple[int, int] | None = (768, 1024)

    @override
    def matches(self, model: Any) -> bool:
        return is_original(model) and is_spatial(model)

    @override
    def tower_shape(self, model: Any, **feature_options: Any) -> TowerShape:
        return shape_of_tile(
            super().tower_shape(model),
            'set mm_vision_select_feature to "patch" for a tower with a class token',
        )

    @override
    def items_of(self, images: ImageBatch) -> list[int]:
        """Which entry of `encode` every tile is a part of: the image it was cut from.

        Raises:
            ValueError: sizes are missing although an image has several tiles.
        """
        _check_sizes(images)
        return [index for index, n in enumerate(images.tiles) for _ in range(n)]

    @override
    def image_footprint(
        self, model: Any, size: tuple[int, int] | None, options: Mapping[str, Any]
    ) -> Footprint:
        assert size is not None
        height, width = size
        columns, rows = 0, 0
        if getattr(model.config, "image_aspect_ratio", None) == "anyres":
            columns, rows = _tile_grid(model, (width, height))
        tiles = 1 + columns * rows
        blank = torch.empty(tiles, 3, 1, 1)
        images = ImageBatch(blank, [tiles], [(width, height)], listed=True)
        return self._footprints(model, images)[0]

    @override
    def footprints(self, model: Any, inputs: Mapping[str, Any]) -> dict[str, list[Footprint]]:
        if inputs.get("images") is None:
            return {}
        images = image_batch(inputs["images"], inputs.get("image_sizes"))
        return {"image": self._footprints(model, images)}

    def _footprints(self, model: Any, images: ImageBatch) -> list[Footprint]:
        """Counts by the model's own packing of zeros, with ones for separators."""
        _check_sizes(images)
        n_tokens = self.tower_shape(model).n_tokens
        zeros = [torch.zeros(n, n_tokens, 1) for n in images.tiles]
        rows = pack(model, images, zeros, torch.ones(1))
        return [
            Footprint(len(row), n, int(row.sum()))
            for row, n in zip(rows, images.tiles, strict=True)
        ]

    @override
    def encode(self, model: Any, inputs: Mapping[str, Any], merge_pass: MergePass) -> list[Encoded]:
        images = image_batch(inputs["images"], inputs.get("image_sizes"))
        footprints, grid, core = self._footprints(model, images), merge_pass.grid, model.get_model()
        assert grid is not None
        items = [
            PackedItem(footprint, _canvases(model, images, index, grid))
            for index, footprint in enumerate(footprints)
        ]
        features = tower_features(model, images.pixels, merge_pass)
        projected: Tensor = core.mm_projector(features)
        check_count(projected.shape[1], features.shape[1])
        newline = getattr(core, "image_newline", None)
        if newline is None:
            newline = projected.new_zeros(projected.shape[-1])

        def own(tiles: list[Tensor], separator: Tensor) -> Sequence[Tensor]:
            return pack(model, images, tiles, separator)

        visual = merge_packed(projected, items, own, newline, merge_pass)
        return [Encoded("image", PLACEHOLDER, visual)]


def _tile_grid(model: Any, size: tuple[int, int]) -> tuple[int, int]:
    """(columns, rows) of the tiles of an image (width, height), by the package's own function.

    Raises:
        TypeError: the preparation knows no such function.
    """
    function = own_function(model, GRID_FUNCTION)
    if function is None:
        raise TypeError(
            f"{type(model).__name__} cuts images into tiles in an unknown way: looked for "
            f"{GRID_FUNCTION} next to {PREPARE}; set model.config.mm_patch_merge_type = 'flat'"
        )
    config = model.config
    side = model.get_vision_tower().config.image_size
    columns, rows = function(size, config.image_grid_pinpoints, side)
    return int(columns), int(rows)


def _check_sizes(images: ImageBatch) -> None:
    """Refuse what would end in an error about None or a shape in the package.

    Raises:
        ValueError: sizes are missing although an image has several tiles.
    """
    found = None if images.sizes is None else len(images.sizes)
    if max(images.tiles) > 1 and (found is None or found < len(images.tiles)):
        raise ValueError(
            "image_sizes must hold the (width, height) of each of the "
            f"{len(images.tiles)} images that are cut into tiles, got {found or 'none'}"
        )


def _canvases(
    model: Any, images: ImageBatch, index: int, grid: tuple[int, int]
) -> tuple[Tensor, ...]:
    if images.tiles[index] == 1:
        return tile_canvases(0, 0, grid)
    wide, high = _tile_grid(model, tuple(images.sizes[index]))
    return tile_canvases(high, wide, grid)
