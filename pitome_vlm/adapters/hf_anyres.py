"""Hugging Face LLaVA-NeXT and its relatives: pictures of any size, cut into tiles.

Knows: which tiles a picture becomes and that the model's own `pack_image_features` makes one
sequence of them. Does not know: how that function unpads and resamples (it is asked), prompts,
algorithms.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..merge.counts import Footprint
from ..merge.merge_pass import MergePass
from ..merge.schedule import TowerShape
from ..merge.tiles import PackedItem, merge_packed
from ..merge.tokens import Encoded
from .features import FEATURE_OPTIONS, checked_pixels, feature_choice, read_features
from .hf_llava import HFLlavaAdapter
from .swap import base_class


class HFAnyResAdapter(HFLlavaAdapter):
    """LlavaNextForConditionalGeneration, and the images of models that take videos as well."""

    model_types: tuple[str, ...] = ("llava_next",)
    counted_per = "tile"
    vision_inputs: tuple[str, ...] = ("pixel_values", "image_sizes", "batch_num_images")
    feature_options: tuple[str, ...] = (*FEATURE_OPTIONS, "vision_aspect_ratio")
    # A photo.
    default_image_size: tuple[int, int] | None = (768, 1024)

    def matches(self, model: Any) -> bool:
        """By model type and parts."""
        return super().matches(model) and hasattr(model.model, "pack_image_features")

    def tower_shape(self, model: Any, **feature_options: Any) -> TowerShape:
        """See `Adapter`; the numbers are those of one tile.

        Raises:
            TypeError: the tower's number of patches depends on the picture.
            ValueError: the tokens of a tile are not its whole grid, which packing needs.
        """
        shape = super().tower_shape(model, **feature_options)
        if shape.grid is None or shape.leading_kept:
            raise ValueError(
                f"a tile has {shape.n_tokens + shape.leading_kept} visual tokens where its grid "
                "of patches is needed to put tiles side by side; set "
                'vision_feature_select_strategy to "default" for a tower with a class token and '
                'to "full" for one without'
            )
        return TowerShape(**vars(shape) | {"packed": True})

    def footprint(
        self,
        model: Any,
        *,
        image_size: tuple[int, int] | None = None,
        frames: int | None = None,
        **feature_options: Any,
    ) -> Footprint:
        """See `Adapter`; by the model's own functions, on shapes alone."""
        if frames is not None:
            return super().footprint(model, frames=frames)
        shape = self.tower_shape(model, **feature_options)
        size = image_size or self.default_image_size
        assert size is not None
        tiles = _tiles(model, size)
        return _footprint(model, shape, size, tiles, feature_options)

    def random_pictures(
        self,
        model: Any,
        ids: Tensor,
        n_pictures: int,
        *,
        image_size: tuple[int, int] | None,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """See `Adapter`: all tiles of pictures of that size."""
        del ids
        size, side = image_size or self.default_image_size, model.config.vision_config.image_size
        assert size is not None
        shape = (n_pictures, _tiles(model, size), 3, side, side)
        return {
            "pixel_values": torch.randn(shape, generator=generator),
            "image_sizes": torch.tensor([size] * n_pictures),
        }

    def footprints(self, model: Any, inputs: Mapping[str, Any]) -> dict[str, list[Footprint]]:
        """See `Adapter`."""
        if inputs.get("pixel_values") is None:
            return {}
        options = {name: inputs[name] for name in self.feature_options if name in inputs}
        shape = self.tower_shape(model, **options)
        known: dict[Any, Footprint] = {}
        found = []
        for size, tiles in _pictures(model, inputs):
            if (size, tiles) not in known:
                known[size, tiles] = _footprint(model, shape, size, tiles, options)
            found.append(known[size, tiles])
        return {"image": found}

    def encode(self, model: Any, inputs: Mapping[str, Any], merge_pass: MergePass) -> list[Encoded]:
        """`get_image_features` of the model itself, with merging per tile and behind packing.

        Args:
            model: an installed model.
            inputs: `pixel_values` [images, tiles, 3, H, W] (or [all tiles, 3, H, W]),
                `image_sizes` [images, 2], and what there is of the other inputs and options.
            merge_pass: a fresh pass; holds the tower's plans afterwards.
        """
        pictures, footprints = _pictures(model, inputs), self.footprints(model, inputs)["image"]
        pixels = _flat_tiles(inputs["pixel_values"], [tiles for _, tiles in pictures])
        choice, parts = feature_choice(model.config, inputs), self.parts(model)
        features = read_features(parts.vision_tower, pixels, merge_pass, choice)
        projected = parts.projector(features)
        grid = merge_pass.grid
        assert grid is not None
        items = [
            PackedItem(footprint, canvases_of(model, size, footprint.tiles, grid))
            for (size, _), footprint in zip(pictures, footprints, strict=True)
        ]
        sizes = [size for size, _ in pictures]

        def pack(tiles: list[Tensor], newline: Tensor) -> Sequence[Tensor]:
            return pack_tiles(model, tiles, sizes, newline, inputs)

        visual = merge_packed(projected, items, pack, model.model.image_newline, merge_pass)
        return [Encoded("image", self.placeholder_ids(model)["image"], visual)]


def _own(model: Any, name: str) -> Any:
    """A function of the module that the model's class is from."""
    return getattr(inspect.getmodule(base_class(model.model)), name)


def _tiles(model: Any, size: tuple[int, int]) -> int:
    """Tiles of a picture (height, width), the overview included."""
    config = model.config
    count = _own(model, "image_size_to_num_patches")
    return int(count(list(size), config.image_grid_pinpoints, config.vision_config.image_size))


def _pictures(model: Any, inputs: Mapping[str, Any]) -> list[tuple[tuple[int, int], int]]:
    """(height, width) and number of tiles of every picture of a call.

    Raises:
        ValueError: the sizes are missing or do not belong to the pixels.
    """
    sizes = inputs.get("image_sizes")
    if sizes is None:
        raise ValueError(
            "image_sizes are missing: this model needs the (height, width) of every picture "
            "beside pixel_values; pass everything that the processor returned"
        )
    plain = [(int(height), int(width)) for height, width in torch.as_tensor(sizes).tolist()]
    alone = [True] * len(plain)
    if inputs.get("batch_num_images") is not None:
        # Several pictures in one prompt are one tile each.
        numbers = torch.as_tensor(inputs["batch_num_images"]).flatten().tolist()
        alone = [number == 1 for number in numbers for _ in range(number)]
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


def _flat_tiles(pixel_values: Any, tiles: list[int]) -> Tensor:
    """[all tiles, 3, H, W] without the tiles that pad a batch.

    Raises:
        ValueError: there are other tiles than the sizes of the pictures ask for.
    """
    layout = "[images, tiles, 3, height, width] or [tiles of all images, 3, height, width]"
    pixels = checked_pixels(pixel_values, layout, (4, 5))
    if pixels.dim() == 4:
        if len(pixels) != sum(tiles):
            raise ValueError(
                f"pixel_values hold {len(pixels)} tiles, but the pictures' image_sizes make "
                f"{sum(tiles)}; both must come from the same call of the processor"
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
    """The model's own packing of tiles [t, N, C] per picture."""
    core, config = model.model, model.config
    known = {
        "vision_feature_select_strategy": feature_choice(config, options).strategy,
        "vision_aspect_ratio": options.get("vision_aspect_ratio")
        or getattr(config, "vision_aspect_ratio", None),
    }
    taken = inspect.signature(core.pack_image_features).parameters
    arguments = {name: value for name, value in known.items() if name in taken}
    packed: Sequence[Tensor]
    packed, _ = core.pack_image_features(
        tiles, [list(size) for size in sizes], image_newline=newline, **arguments
    )
    return packed


def _footprint(
    model: Any,
    shape: TowerShape,
    size: tuple[int, int],
    tiles: int,
    options: Mapping[str, Any],
) -> Footprint:
    """The counts of a picture, by packing tensors that have a shape and no content."""
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
    """The overview, and the other tiles side by side, as cells (`packed.PackedItem`)."""
    rows, columns = grid
    overview = torch.arange(rows * columns).view(rows, columns)
    if tiles == 1:
        return (overview,)
    config = model.config
    high, wide = _own(model, "get_anyres_image_grid_shape")(
        list(size), config.image_grid_pinpoints, config.vision_config.image_size
    )
    cells = torch.arange(high * wide * rows * columns).view(high, wide, rows, columns)
    together = cells.permute(0, 2, 1, 3).reshape(high * rows, wide * columns)
    return overview, together + rows * columns
