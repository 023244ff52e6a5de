"""The original llava package (haotian-liu/LLaVA, `llava-torch`): where its tower and projector are.

Knows: the parts that `LlavaLlamaForCausalLM` and its Mistral and MPT siblings have in common, by
duck type; the package is no dependency. Does not know: algorithms, prompts, or how the package
lays pictures out (`original_code.py` asks it).
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
from ..merge.tokens import Encoded, VisualTokens
from .features import check_count, no_videos
from .original_code import PLACEHOLDER, PREPARE, Pictures, own_function, pack, pictures_of
from .parts import ModelParts
from .tower import encoding, find_encoder_layers, install_tower, uninstall_tower
from .tower_tokens import feature_depth, has_class_token, patch_grid
from .usual import UsualModel

METHODS = ("get_model", "get_vision_tower", PREPARE)
SELECTIONS = ("patch", "cls_patch")
# (height, width) of a photo; only what is printed depends on it.
DEFAULT_IMAGE_SIZE = (768, 1024)
GRID_FUNCTION = "get_anyres_image_grid_shape"


class OriginalLlavaAdapter(UsualModel):
    """LlavaLlamaForCausalLM, LlavaMistralForCausalLM, LlavaMptForCausalLM and their like.

    With mm_patch_merge_type "flat": a picture is one tile, and where it is given as several they
    follow each other like pictures of their own.
    """

    model_types: tuple[str, ...] = ()
    calls = "original"
    counted_per = "image"
    pixel_inputs: Mapping[str, str] = {"images": "image"}
    vision_inputs: tuple[str, ...] = ("images", "image_sizes")
    feature_options: tuple[str, ...] = ()
    default_image_size: tuple[int, int] | None = None

    def matches(self, model: Any) -> bool:
        """By methods and the projector, so that forks and other language models match too."""
        return _is_original(model) and not _is_spatial(model)

    def tower_shape(self, model: Any, **feature_options: Any) -> TowerShape:
        """See `Adapter`.

        Raises:
            TypeError: the tower is of a kind that is not known here.
            ValueError: the tower is not loaded, or reads features in an unknown way.
        """
        del feature_options
        tower = _loaded_tower(model)
        layer, selection = getattr(tower, "select_layer", None), _selection(tower)
        if not isinstance(layer, int):
            raise TypeError(
                f"vision tower {type(tower).__name__} is not supported: looked for select_layer, "
                f"the hidden state that is read, as a number, found {layer!r}"
            )
        vision = tower.config
        grid = patch_grid(vision)
        patches = grid[0] * grid[1]
        if getattr(tower, "num_patches", patches) != patches:
            raise TypeError(
                f"vision tower {type(tower).__name__} is not supported: it makes "
                f"{tower.num_patches} patches where its picture has {grid[0]} x {grid[1]}"
            )
        class_tokens = int(has_class_token(tower))
        # "patch" cuts off the first token whatever it is.
        n_leading = max(class_tokens, int(selection == "patch"))
        return TowerShape(
            n_tokens=patches + class_tokens - n_leading,
            n_leading=n_leading,
            leading_kept=n_leading if selection == "cls_patch" else 0,
            n_layers=vision.num_hidden_layers,
            used_layers=max(feature_depth(layer, vision.num_hidden_layers)),
            grid=grid if n_leading == class_tokens else None,
        )

    def install(self, model: Any, *, inside_tower: bool) -> None:
        """Swap the classes of the tower's layers; see `HFLlavaAdapter.install`."""
        tower = _loaded_tower(model)
        try:
            find_encoder_layers(tower)
        except TypeError:
            if inside_tower:
                raise
            return
        install_tower(tower)

    def uninstall(self, model: Any) -> None:
        """Give the tower its own classes back."""
        uninstall_tower(model.get_vision_tower())

    def text_config(self, model: Any) -> Any:
        """Configuration of the language model, the object its attention layers read."""
        return model.get_model().config

    def parts(self, model: Any) -> ModelParts:
        """See `Adapter`. Tower and projector sit inside the language model here."""
        core, tower = model.get_model(), _loaded_tower(model)
        others = (tower, core.mm_projector)
        language = tuple(part for part in core.children() if all(part is not one for one in others))
        # generate asks for the last logits alone where `forward` can be asked so.
        all_logits = "logits_to_keep" not in inspect.signature(model.forward).parameters
        return ModelParts(tower, tower.config, core.mm_projector, language, all_logits)

    def placeholder_ids(self, model: Any) -> dict[str, int]:
        """See `Adapter`: one id per picture, whatever its number of tokens."""
        del model
        return {"image": PLACEHOLDER}

    def items_of(self, pictures: Pictures) -> list[int]:
        """What every tile is a part of, as `encode` counts: here each is one of its own."""
        return list(range(len(pictures.pixels)))

    def footprint(
        self,
        model: Any,
        *,
        image_size: tuple[int, int] | None = None,
        frames: int | None = None,
        **feature_options: Any,
    ) -> Footprint:
        """See `Adapter`: every picture is brought to one size."""
        del image_size
        no_videos(model, frames)
        shape = self.tower_shape(model, **feature_options)
        return Footprint(shape.n_tokens + shape.leading_kept)

    def footprints(self, model: Any, inputs: Mapping[str, Any]) -> dict[str, list[Footprint]]:
        """See `Adapter`."""
        if inputs.get("images") is None:
            return {}
        tiles = pictures_of(inputs["images"]).tiles
        return {"image": [self.footprint(model)] * sum(tiles)}

    def encode(self, model: Any, inputs: Mapping[str, Any], merge_pass: MergePass) -> list[Encoded]:
        """`encode_images` of the model itself, with merging in its two places.

        Args:
            model: an installed model.
            inputs: `images` in any form the package takes.
            merge_pass: a fresh pass; holds the plans afterwards.
        """
        states = _tower_features(model, pictures_of(inputs["images"]).pixels, merge_pass)
        features = merge_pass.merge_features(states)
        counts = [len(feature) for feature in features]
        # Projectors work token by token: pictures of different length go through as one row.
        same = len(set(counts)) == 1
        batch = torch.stack(features) if same else torch.cat(features)[None]
        projected = _projected(model, batch)
        images, device = len(features), projected.device
        visual = VisualTokens(
            list(projected) if same else list(torch.split(projected[0], counts)),
            merge_pass.source_maps(images, device),
            [merge_pass.schedule.tokens_in] * images,
            merge_pass.anchors(images, device),
        )
        return [Encoded("image", PLACEHOLDER, visual)]


class OriginalAnyResAdapter(OriginalLlavaAdapter):
    """The same models with mm_patch_merge_type "spatial" or "spatial_unpad" (LLaVA-1.6)."""

    counted_per = "tile"
    default_image_size: tuple[int, int] | None = DEFAULT_IMAGE_SIZE

    def matches(self, model: Any) -> bool:
        """By methods, the projector and the way tiles are put together."""
        return _is_original(model) and _is_spatial(model)

    def tower_shape(self, model: Any, **feature_options: Any) -> TowerShape:
        """See `Adapter`; the numbers are those of one tile.

        Raises:
            TypeError: the tower is of a kind that is not known here.
            ValueError: the tokens of a tile are not its whole grid, which packing needs.
        """
        shape = super().tower_shape(model, **feature_options)
        if shape.grid is None or shape.leading_kept:
            raise ValueError(
                f"a tile has {shape.n_tokens + shape.leading_kept} visual tokens where its grid "
                "of patches is needed to put tiles side by side; set mm_vision_select_feature to "
                '"patch" for a tower with a class token'
            )
        return TowerShape(**vars(shape) | {"packed": True})

    def items_of(self, pictures: Pictures) -> list[int]:
        """What every tile is a part of, as `encode` counts: a picture."""
        return [index for index, n in enumerate(pictures.tiles) for _ in range(n)]

    def footprint(
        self,
        model: Any,
        *,
        image_size: tuple[int, int] | None = None,
        frames: int | None = None,
        **feature_options: Any,
    ) -> Footprint:
        """See `Adapter`; by the model's own code, on zeros."""
        del feature_options
        no_videos(model, frames)
        height, width = image_size or DEFAULT_IMAGE_SIZE
        columns, rows = 0, 0
        if getattr(model.config, "image_aspect_ratio", None) == "anyres":
            columns, rows = _tile_grid(model, (width, height))
        tiles = 1 + columns * rows
        blank = torch.empty(tiles, 3, 1, 1)
        pictures = Pictures(blank, [tiles], [(width, height)], listed=True)
        return self._footprints(model, pictures)[0]

    def footprints(self, model: Any, inputs: Mapping[str, Any]) -> dict[str, list[Footprint]]:
        """See `Adapter`."""
        if inputs.get("images") is None:
            return {}
        pictures = pictures_of(inputs["images"], inputs.get("image_sizes"))
        return {"image": self._footprints(model, pictures)}

    def _footprints(self, model: Any, pictures: Pictures) -> list[Footprint]:
        _check_sizes(pictures)
        n_tokens = self.tower_shape(model).n_tokens
        zeros = [torch.zeros(n, n_tokens, 1) for n in pictures.tiles]
        return [
            Footprint(len(row), n, int(row.sum()))
            for row, n in zip(
                pack(model, pictures, zeros, torch.ones(1)), pictures.tiles, strict=True
            )
        ]

    def encode(self, model: Any, inputs: Mapping[str, Any], merge_pass: MergePass) -> list[Encoded]:
        """Tower and projector, with merging per tile and behind packing.

        Args:
            model: an installed model.
            inputs: `images` in any form the package takes, `image_sizes` (width, height).
            merge_pass: a fresh pass; holds the tower's plans afterwards.
        """
        pictures = pictures_of(inputs["images"], inputs.get("image_sizes"))
        footprints, grid = self._footprints(model, pictures), merge_pass.grid
        assert grid is not None
        items = [
            PackedItem(footprint, _canvases(model, pictures, index, grid))
            for index, footprint in enumerate(footprints)
        ]
        projected = _projected(model, _tower_features(model, pictures.pixels, merge_pass))
        newline = getattr(model.get_model(), "image_newline", None)
        if newline is None:
            newline = projected.new_zeros(projected.shape[-1])

        def own(tiles: list[Tensor], separator: Tensor) -> Sequence[Tensor]:
            return pack(model, pictures, tiles, separator)

        visual = merge_packed(projected, items, own, newline, merge_pass)
        return [Encoded("image", PLACEHOLDER, visual)]


def _is_original(model: Any) -> bool:
    return all(callable(getattr(model, method, None)) for method in METHODS) and hasattr(
        model.get_model(), "mm_projector"
    )


def _is_spatial(model: Any) -> bool:
    return str(getattr(model.config, "mm_patch_merge_type", "flat")).startswith("spatial")


def _loaded_tower(model: Any) -> Any:
    tower = model.get_vision_tower()
    if tower is None:
        raise ValueError(
            f"{type(model).__name__} has no vision tower: its config names no mm_vision_tower"
        )
    if not getattr(tower, "is_loaded", True):
        raise ValueError(
            f"the vision tower of {type(model).__name__} is not loaded yet; call "
            "model.get_vision_tower().load_model() first, as load_pretrained_model does"
        )
    return tower


def _selection(tower: Any) -> str:
    selection: str = getattr(tower, "select_feature", "patch")
    if selection not in SELECTIONS:
        raise ValueError(
            f"mm_vision_select_feature must be one of {', '.join(SELECTIONS)}, got {selection!r}"
        )
    return selection


def _tower_features(model: Any, pixels: Tensor, merge_pass: MergePass) -> Tensor:
    """[tiles, M, C] of the tower itself, which selects the layer and drops its class token."""
    tower = _loaded_tower(model)
    with encoding(tower, merge_pass):
        states: Tensor = tower(pixels)
    check_count(states.shape[1], merge_pass.schedule.tower_out)
    return states


def _projected(model: Any, features: Tensor) -> Tensor:
    projected: Tensor = model.get_model().mm_projector(features)
    check_count(projected.shape[1], features.shape[1])
    return projected


def _tile_grid(model: Any, size: tuple[int, int]) -> tuple[int, int]:
    """(columns, rows) of the tiles of a picture (width, height), by the package's own function.

    Raises:
        TypeError: the preparation knows no such function.
    """
    function = own_function(model, GRID_FUNCTION)
    if function is None:
        raise TypeError(
            f"{type(model).__name__} cuts pictures into tiles in an unknown way: looked for "
            f"{GRID_FUNCTION} beside {PREPARE}; set model.config.mm_patch_merge_type = 'flat'"
        )
    config = model.config
    side = model.get_vision_tower().config.image_size
    columns, rows = function(size, config.image_grid_pinpoints, side)
    return int(columns), int(rows)


def _check_sizes(pictures: Pictures) -> None:
    """The package itself ends in an error about None, or about a shape.

    Raises:
        ValueError: sizes are missing although a picture has several tiles.
    """
    found = None if pictures.sizes is None else len(pictures.sizes)
    if max(pictures.tiles) > 1 and (found is None or found < len(pictures.tiles)):
        raise ValueError(
            "image_sizes must hold the (width, height) of each of the "
            f"{len(pictures.tiles)} images that are cut into tiles, got {found or 'none'}"
        )


def _canvases(
    model: Any, pictures: Pictures, index: int, grid: tuple[int, int]
) -> tuple[Tensor, ...]:
    """The overview, and the other tiles side by side, as cells (`packed.PackedItem`)."""
    rows, columns = grid
    overview = torch.arange(rows * columns).view(rows, columns)
    if pictures.tiles[index] == 1:
        return (overview,)
    wide, high = _tile_grid(model, tuple(pictures.sizes[index]))
    cells = torch.arange(high * wide * rows * columns).view(high, wide, rows, columns)
    together = cells.permute(0, 2, 1, 3).reshape(high * rows, wide * columns)
    return overview, together + rows * columns
