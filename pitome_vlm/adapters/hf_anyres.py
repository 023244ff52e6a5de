"""Hugging Face LLaVA-NeXT and its relatives: images of any size, cut into tiles.

The model's own `pack_image_features` makes one sequence of an image's tiles. How it unpads and
resamples is found out by calling it, not written down again here.
"""

from __future__ import annotations

import inspect
import math
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
from ..releases import accepted
from .features import (
    FEATURE_OPTIONS,
    checked_pixels,
    feature_choice,
    read_features,
    shape_of_tile,
    tile_canvases,
)
from .hf_llava import HFLlavaAdapter
from .swap import base_class

# Whether each of some selected images is cut into tiles, where their prompts no longer tell.
TILED = "tiled"


class HFAnyResAdapter(HFLlavaAdapter):
    """LlavaNextForConditionalGeneration, and the images of models that take videos as well.

    Inputs: `pixel_values` [images, tiles, 3, height, width] or [tiles of all images, 3, height,
    width], `image_sizes` [images, 2]. The numbers of `tower_shape` are those of one tile.
    """

    model_types: tuple[str, ...] = ("llava_next",)
    counted_per = "tile"
    vision_inputs: tuple[str, ...] = ("pixel_values", "image_sizes", "batch_num_images")
    feature_options: tuple[str, ...] = (*FEATURE_OPTIONS, "vision_aspect_ratio")
    # A photo.
    default_image_size: tuple[int, int] | None = (768, 1024)

    @override
    def matches(self, model: Any) -> bool:
        return super().matches(model) and hasattr(model.model, "pack_image_features")

    @override
    def tower_shape(self, model: Any, **feature_options: Any) -> TowerShape:
        return shape_of_tile(
            super().tower_shape(model, **feature_options),
            'set vision_feature_select_strategy to "default" for a tower with a class token and to '
            '"full" for one without',
        )

    @override
    def image_footprint(
        self, model: Any, size: tuple[int, int] | None, options: Mapping[str, Any]
    ) -> Footprint:
        assert size is not None
        shape = self.tower_shape(model, **options)
        return _footprint(model, shape, size, _tiles(model, size), options)

    @override
    def random_images(
        self,
        model: Any,
        ids: Tensor,
        n_images: int,
        *,
        image_size: tuple[int, int] | None,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        size, side = image_size or self.default_image_size, model.config.vision_config.image_size
        assert size is not None
        shape = (n_images, _tiles(model, size), 3, side, side)
        return {
            "pixel_values": torch.randn(shape, generator=generator),
            "image_sizes": torch.tensor([size] * n_images),
        }

    @override
    def footprints(self, model: Any, inputs: Mapping[str, Any]) -> dict[str, list[Footprint]]:
        if inputs.get("pixel_values") is None:
            return {}
        options = self.options_of(inputs)
        shape = self.tower_shape(model, **options)
        known: dict[Any, Footprint] = {}
        found = []
        for size, tiles in _sizes_and_tiles(model, inputs):
            if (size, tiles) not in known:
                known[size, tiles] = _footprint(model, shape, size, tiles, options)
            found.append(known[size, tiles])
        return {"image": found}

    @override
    def image_planes(self, model: Any, inputs: Mapping[str, Any]) -> list[tuple[Tensor, ...]]:
        """The overview, then the other tiles side by side without padding."""
        grid = self.tower_shape(model, **self.options_of(inputs)).grid
        assert grid is not None
        cells = math.prod(grid)
        planes: list[tuple[Tensor, ...]] = []
        for footprint in self.footprints(model, inputs)["image"]:
            overview = torch.arange(cells).view(grid)
            if footprint.tiles == 1:
                planes.append((overview,))
                continue
            # Every row ends in a newline.
            rows = torch.arange(cells, footprint.full).view(footprint.newlines, -1)
            planes.append((overview, rows[:, :-1]))
        return planes

    @override
    def looked_at(self, model: Any, inputs: Mapping[str, Any]) -> dict[str, list[Tensor]]:
        if inputs.get("pixel_values") is None:
            return {}
        tiles = [count for _, count in _sizes_and_tiles(model, inputs)]
        flat = _flat_tiles(inputs["pixel_values"], tiles)
        return {"image": [own[:1] for own in torch.split(flat, tiles)]}

    @override
    def select(
        self, model: Any, inputs: Mapping[str, Any], kind: str, members: list[int]
    ) -> dict[str, Any]:
        tiles = [count for _, count in _sizes_and_tiles(model, inputs)]
        flat = torch.split(_flat_tiles(inputs["pixel_values"], tiles), tiles)
        chosen = {
            **self.options_of(inputs),
            "pixel_values": torch.cat([flat[one] for one in members]),
            "image_sizes": torch.as_tensor(inputs["image_sizes"])[members],
        }
        if inputs.get("batch_num_images") is not None:
            chosen[TILED] = [_alone(inputs)[one] for one in members]
        return chosen

    @override
    def encode(self, model: Any, inputs: Mapping[str, Any], merge_pass: MergePass) -> list[Encoded]:
        images, footprints = (
            _sizes_and_tiles(model, inputs),
            self.footprints(model, inputs)["image"],
        )
        pixels = _flat_tiles(inputs["pixel_values"], [tiles for _, tiles in images])
        choice, parts = feature_choice(model.config, inputs), self.parts(model)
        features = read_features(parts.vision_tower, pixels, merge_pass, choice)
        projected = parts.projector(features)
        grid = merge_pass.grid
        assert grid is not None
        items = [
            PackedItem(footprint, canvases_of(model, size, footprint.tiles, grid))
            for (size, _), footprint in zip(images, footprints, strict=True)
        ]
        sizes = [size for size, _ in images]

        def pack(tiles: list[Tensor], newline: Tensor) -> Sequence[Tensor]:
            return pack_tiles(model, tiles, sizes, newline, inputs)

        visual = merge_packed(projected, items, pack, model.model.image_newline, merge_pass)
        return [Encoded("image", self.placeholder_ids(model)["image"], visual)]


def _own(model: Any, name: str) -> Any:
    """A function of the module that defines the model's class."""
    return getattr(inspect.getmodule(base_class(model.model)), name)


def _tiles(model: Any, size: tuple[int, int]) -> int:
    """Tiles of an image (height, width), the overview included."""
    config = model.config
    count = _own(model, "image_size_to_num_patches")
    return int(count(list(size), config.image_grid_pinpoints, config.vision_config.image_size))


def _sizes_and_tiles(model: Any, inputs: Mapping[str, Any]) -> list[tuple[tuple[int, int], int]]:
    """(height, width) and number of tiles of every image of a call.

    Raises:
        ValueError: the sizes are missing or do not belong to the pixels.
    """
    sizes = inputs.get("image_sizes")
    if sizes is None:
        raise ValueError(
            "image_sizes are missing: this model needs the (height, width) of every image with "
            "its pixel_values; pass everything that the processor returned"
        )
    plain = [(int(height), int(width)) for height, width in torch.as_tensor(sizes).tolist()]
    alone = [True] * len(plain)
    if inputs.get("batch_num_images") is not None or TILED in inputs:
        alone = _alone(inputs)
        if len(alone) != len(plain):
            raise ValueError(
                f"batch_num_images counts {len(alone)} images, but image_sizes hold {len(plain)}"
            )
    for height, width in plain:
        if height < 1 or width < 1:
            raise ValueError(f"image_sizes must be at least 1 x 1, got {height} x {width}")
    return [
        (size, _tiles(model, size) if tiled else 1)
        for size, tiled in zip(plain, alone, strict=True)
    ]


def _alone(inputs: Mapping[str, Any]) -> list[bool]:
    """Whether every image is the only one of its prompt; several in one prompt are a tile each."""
    if TILED in inputs:
        known: list[bool] = inputs[TILED]
        return known
    numbers = torch.as_tensor(inputs["batch_num_images"]).flatten().tolist()
    return [number == 1 for number in numbers for _ in range(number)]


def _flat_tiles(pixel_values: Any, tiles: list[int]) -> Tensor:
    """[all tiles, 3, H, W] without the tiles that pad a batch.

    Raises:
        ValueError: the number of tiles does not follow from the sizes of the images.
    """
    layout = "[images, tiles, 3, height, width] or [tiles of all images, 3, height, width]"
    pixels = checked_pixels(pixel_values, layout, (4, 5))
    if pixels.dim() == 4:
        if len(pixels) != sum(tiles):
            raise ValueError(
                f"pixel_values hold {len(pixels)} tiles, but image_sizes make {sum(tiles)}; both "
                "must come from the same call of the processor"
            )
        return pixels
    if len(pixels) != len(tiles) or pixels.shape[1] < max(tiles):
        raise ValueError(
            f"pixel_values hold {len(pixels)} images of up to {pixels.shape[1]} tiles, but "
            f"image_sizes stand for {len(tiles)} images of up to {max(tiles)}; both must come "
            "from the same call of the processor"
        )
    return torch.cat([own[:count] for own, count in zip(pixels, tiles, strict=True)])


def pack_tiles(
    model: Any,
    tiles: list[Tensor],
    sizes: list[tuple[int, int]],
    newline: Tensor | None,
    options: Mapping[str, Any],
) -> Sequence[Tensor]:
    """The model's own packing: tiles [t, N, C] of every image to one sequence [L, C] of each."""
    core, config = model.model, model.config
    known = {
        "vision_feature_select_strategy": feature_choice(config, options).strategy,
        "vision_aspect_ratio": options.get("vision_aspect_ratio")
        or getattr(config, "vision_aspect_ratio", None),
    }
    packed: Sequence[Tensor]
    packed, _ = core.pack_image_features(
        tiles,
        [list(size) for size in sizes],
        image_newline=newline,
        **accepted(core.pack_image_features, known),
    )
    return packed


def _footprint(
    model: Any,
    shape: TowerShape,
    size: tuple[int, int],
    tiles: int,
    options: Mapping[str, Any],
) -> Footprint:
    """The counts of an image, by packing tensors that have a shape and no content."""
    blank = torch.empty(tiles, shape.n_tokens, 1, device="meta")
    newline = torch.empty(1, device="meta")
    full, bare = (
        len(pack_tiles(model, [blank], [size], separator, options)[0])
        for separator in (newline, None)
    )
    return Footprint(full, tiles, full - bare)


def canvases_of(
    model: Any, size: tuple[int, int], tiles: int, grid: tuple[int, int]
) -> tuple[Tensor, ...]:
    """The overview and the other tiles side by side (`features.tile_canvases`)."""
    if tiles == 1:
        return tile_canvases(0, 0, grid)
    config = model.config
    high, wide = _own(model, "get_anyres_image_grid_shape")(
        list(size), config.image_grid_pinpoints, config.vision_config.image_size
    )
    return tile_canvases(high, wide, grid)
