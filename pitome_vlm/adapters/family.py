"""What a record of a family of models says, and the usual ways to count an image's tokens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .grids import PIXELS, Grid, given, given_grids

# The configuration, a call's arguments and a kind to the grid of every image (or tile), in the
# order of their placeholders.
Grids = Callable[[Any, Mapping[str, Any], str], list[Grid]]
# The configuration and an image's (height, width) in pixels to its grid.
Cells = Callable[[Any, tuple[int, int]], Grid]


def _temporal_patch(config: Any) -> int:
    return int(getattr(config.vision_config, "temporal_patch_size", 1))


@dataclass(frozen=True)
class Family:
    """What the generic adapter has to be told about a family of models.

    Attributes:
        model_types: values of `config.model_type`.
        of_tower: the same of the vision tower's configuration, where that tells a family from
            another one; None for any.
        grids: of the images of a call.
        cells: of one image of a size; None where every image (or tile) has the same number of
            tokens.
        inputs: the arguments of every kind ("image", "video"), pixels first.
        places: further arguments that only say where tokens are. Families that have them place
            tokens in time, rows and columns.
        field: of what `get_image_features` returns, the features that are put into the prompt.
        levels: of the same, further features of the same tokens for deeper layers (deepstack).
        patches: by the configuration, patches of the tower that become one token; None where the
            tower sees square images of one size.
        tower_grids: of the patches of images, where a tower in which they merge ("grid") takes
            images of any size; None where all are as its configuration says.
        first_place: position of a prompt's first token.
        one_mask: the language model takes no masks by layer type.
        placeholders: kinds whose placeholder is named after another kind.
        shown: by kind, the argument that says which of its tokens the prompt shows.
        tower: how tokens merge inside the vision tower (`unit_tower.py`, `grid_tower.py`); None
            where the tower is left alone. A tower without the parts that takes is left alone too.
        unit: what has one count where `cells` is None: "tile", or "image" of which there are no
            tiles.
        frames_per_grid: by the configuration, frames of a video that share their tokens.
        several_grids: the tokens of an image are those of several grids in a row.
    """

    model_types: tuple[str, ...]
    grids: Grids
    cells: Cells | None = None
    inputs: Mapping[str, tuple[str, ...]] = dataclasses.field(
        default_factory=lambda: {"image": ("pixel_values",)}
    )
    places: tuple[str, ...] = ()
    field: str = "pooler_output"
    levels: str | None = None
    patches: Callable[[Any], int] | None = None
    tower_grids: Grids | None = None
    first_place: int = 0
    one_mask: bool = False
    placeholders: Mapping[str, str] = dataclasses.field(default_factory=dict)
    shown: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tower: Literal["units", "grid"] | None = None
    unit: str = "tile"
    frames_per_grid: Callable[[Any], int] = _temporal_patch
    several_grids: bool = False
    of_tower: str | None = None


def square(tokens: int) -> Grid:
    """The grid of so many tokens: a square where that is possible, otherwise a row."""
    side = math.isqrt(tokens)
    return (1, side, side) if side * side == tokens else (1, 1, tokens)


def tiles(tokens: Callable[[Any], int]) -> Grids:
    """Every image (or tile) has the same number of tokens; pixels are [..., 3, H, W]."""

    def grids(config: Any, inputs: Mapping[str, Any], kind: str) -> list[Grid]:
        # Tiles of one size: it is enough to count them.
        pixels = inputs[PIXELS[kind]]
        return [square(tokens(config))] * math.prod(pixels.shape[:-3])

    return grids


def tiles_that_hold_something(tokens: Callable[[Any], int]) -> Grids:
    """The same for pixels [B, most tiles, 3, H, W] that are padded with tiles of zeros."""

    def grids(config: Any, inputs: Mapping[str, Any], kind: str) -> list[Grid]:
        pixels, mask = inputs["pixel_values"], inputs.get("pixel_attention_mask")
        if mask is not None and mask.shape[:2] != pixels.shape[:2]:
            raise ValueError(
                f"pixel_values are of {list(pixels.shape[:2])} rows and tiles of the {kind}s, "
                f"pixel_attention_mask of {list(mask.shape[:2])}; pass both as the processor "
                "returned them"
            )
        real = (pixels != 0).flatten(2).any(-1)
        return [square(tokens(config))] * int(real.sum())

    return grids


def unhidden_tiles(config: Any, inputs: Mapping[str, Any], kind: str) -> list[Grid]:
    """The patches of the same tiles.

    Raises:
        ValueError: a mask hides a part of a tile that holds something.
    """
    real = (inputs["pixel_values"] != 0).flatten(2).any(-1)
    mask = inputs.get("pixel_attention_mask")
    if mask is not None and not bool((mask[real.to(mask.device)] != 0).all()):
        raise ValueError(
            f"pixel_attention_mask hides a part of a tile of the {kind}s, which tokens that merge "
            'in the tower would not respect; use stage="projector"'
        )
    return [square(vit_tokens(config))] * int(real.sum())


def patch_grids(side: Callable[[Any], int]) -> Grids:
    """`{kind}_grid_thw` counts patches, of which the model makes one token of `side` x `side`."""

    def grids(config: Any, inputs: Mapping[str, Any], kind: str) -> list[Grid]:
        cell = side(config)
        return [(t, h // cell, w // cell) for t, h, w in given_grids(inputs, kind)]

    return grids


def image_sizes(name: str, cell: Callable[[Any], int]) -> Grids:
    """`name` holds (height, width) of every image, `cell` x `cell` of which become one token."""

    def grids(config: Any, inputs: Mapping[str, Any], kind: str) -> list[Grid]:
        side, sizes = cell(config), given(inputs, name, kind)
        if not _fit(sizes, inputs["pixel_values"]):
            raise ValueError(
                f"{name} {str(sizes)[:100]} are not those of pixel_values "
                f"{list(inputs['pixel_values'].shape)}; pass both as the processor returned them"
            )
        return [(1, h // side, w // side) for h, w in sizes]

    return grids


def _fit(sizes: list[Any], pixels: Any) -> bool:
    """Whether images [n, C, H, W], or of so many patches [n, P, C], are large enough."""
    if len(sizes) != len(pixels):
        return False
    if pixels.dim() == 3:
        return all(h * w <= pixels.shape[1] for h, w in sizes)
    return all(h <= pixels.shape[-2] and w <= pixels.shape[-1] for h, w in sizes)


def rounded(pixels: Callable[[Any], int]) -> Cells:
    """Images are resized so that a token stands for `pixels` x `pixels` of them."""

    def cells(config: Any, size: tuple[int, int]) -> Grid:
        rows, columns = (max(1, round(side / pixels(config))) for side in size)
        return 1, rows, columns

    return cells


def padded(pixels: Callable[[Any], int]) -> Cells:
    """Images are padded so that a token stands for `pixels` x `pixels` of them."""

    def cells(config: Any, size: tuple[int, int]) -> Grid:
        rows, columns = (-(-side // pixels(config)) for side in size)
        return 1, rows, columns

    return cells


def fitted(pixels: Callable[[Any], int]) -> Cells:
    """The same for Pixtral's processor: no side longer than the tower knows, cells rounded up."""

    def cells(config: Any, size: tuple[int, int]) -> Grid:
        longest = config.vision_config.image_size
        shrink = max(1.0, *(side / longest for side in size))
        rows, columns = (
            -(-(math.floor(side / shrink) if shrink > 1 else side) // pixels(config))
            for side in size
        )
        return 1, max(1, rows), max(1, columns)

    return cells


def vit_tokens(config: Any, down: int = 1) -> int:
    """Patches of a square image after `down` x `down` of them became one."""
    vision = config.vision_config
    size, patch = (
        one if isinstance(one, int) else one[0] for one in (vision.image_size, vision.patch_size)
    )
    return int((size // patch // down) ** 2)
