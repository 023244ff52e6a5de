"""What LLaVA-style models share: from pixels to the features of chosen layers, and on to tokens.

Handles `vision_feature_layer`, the select strategy and how a tower is called.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..merge.merge_pass import MergePass
from ..merge.schedule import TowerShape
from ..merge.tokens import VisualTokens
from ..releases import states_to_keep
from .tower import encoding
from .tower_tokens import feature_depth, leading_tokens, patch_grid

STRATEGIES = ("default", "full")
# Options of one call that change which features are read.
FEATURE_OPTIONS = ("vision_feature_layer", "vision_feature_select_strategy")


@dataclass(frozen=True)
class FeatureChoice:
    """Which of a tower's hidden states are read, and whether their first token is cut off.

    Attributes:
        layer: index into `hidden_states`, or several whose features are concatenated.
        strategy: "default" cuts the first token off, "full" does not.
    """

    layer: int | list[int]
    strategy: str


def feature_choice(config: Any, options: Mapping[str, Any]) -> FeatureChoice:
    """What a call asks for, or else what the model's config says.

    Raises:
        ValueError: no layer, or an unknown strategy.
    """
    layer = options.get("vision_feature_layer")
    for name in ("vision_feature_layer", "vision_feature_layers"):
        layer = getattr(config, name, None) if layer is None else layer
    if layer is None:
        raise ValueError("the model's config names no vision_feature_layer")
    strategy = options.get("vision_feature_select_strategy")
    if strategy is None:
        # ViP-LLaVA has no such option: it always drops the first token.
        strategy = getattr(config, "vision_feature_select_strategy", None) or "default"
    if strategy not in STRATEGIES:
        raise ValueError(
            f"vision_feature_select_strategy must be one of {', '.join(STRATEGIES)}, "
            f"got {strategy!r}"
        )
    return FeatureChoice(layer if isinstance(layer, int) else list(layer), strategy)


def shape_of_tower(tower: Any, vision_config: Any, choice: FeatureChoice) -> TowerShape:
    """The numbers of a tower that sees images of one fixed size.

    Raises:
        TypeError: the tower's number of patches depends on the image.
        ValueError: a feature layer outside the tower.
    """
    grid = patch_grid(vision_config)
    return shape_from_numbers(
        grid, vision_config.num_hidden_layers, choice, leading_tokens(tower, vision_config)
    )


def shape_from_numbers(
    grid: tuple[int, int], n_layers: int, choice: FeatureChoice, special: int
) -> TowerShape:
    """The numbers of a tower that need not be loaded.

    Args:
        grid: (rows, columns) of its patches.
        n_layers: its layers.
        choice: which features are read.
        special: class and register tokens before the patches.

    Raises:
        ValueError: a feature layer outside the tower.
    """
    # "default" cuts off the first token whatever it is; on a tower without a class token that
    # is the first patch, which then must not be merged into anything that stays.
    n_leading = max(special, int(choice.strategy == "default"))
    cut = int(choice.strategy == "default")
    return TowerShape(
        n_tokens=grid[0] * grid[1] + special - n_leading,
        n_leading=n_leading,
        leading_kept=n_leading - cut,
        n_layers=n_layers,
        used_layers=max(feature_depth(choice.layer, n_layers)),
        grid=grid if n_leading == special else None,
    )


def read_features(
    tower: Any, pixel_values: Tensor, merge_pass: MergePass, choice: FeatureChoice, **inputs: Any
) -> Tensor:
    """Run a tower, merging as scheduled, and read the chosen layers.

    Args:
        tower: with merging installed, where it has to merge.
        pixel_values: [B, 3, H, W].
        merge_pass: a fresh pass; holds the tower's plans afterwards.
        choice: which features.
        **inputs: further inputs of the tower.

    Returns:
        [B, leading_kept + M, C], features of several layers concatenated.
    """
    with encoding(tower, merge_pass):
        outputs = tower(pixel_values, output_hidden_states=states_to_keep(choice.layer), **inputs)
    states = outputs.hidden_states
    depths = feature_depth(choice.layer, len(states) - 1)
    # Features of several depths are concatenated per token: the shallower ones have to go
    # through the merges that were made after them.
    carried = [merge_pass.carry(states[depth], depth) for depth in depths]
    if choice.strategy == "default":
        carried = [state[:, 1:] for state in carried]
    joined = torch.cat(carried, dim=-1) if len(carried) > 1 else carried[0]
    check_count(joined.shape[1], merge_pass.schedule.tower_out)
    return joined


def check_count(found: int, scheduled: int) -> None:
    """Check that a module kept the number of tokens.

    Raises:
        RuntimeError: it did not.
    """
    if found != scheduled:
        raise RuntimeError(
            f"the vision tower gave {found} visual tokens per image where {scheduled} were "
            "scheduled; usually pixel_values have another size, or a module hides the tower"
        )


def merged_images(
    features: Tensor, project: Callable[[Tensor], Tensor], merge_pass: MergePass
) -> VisualTokens:
    """Images of one tile, [images, N, C]: merged after the tower where scheduled, then projected.

    Raises:
        RuntimeError: the projector, [B, M, C] to [B, M, D], changed the number of tokens.
    """
    merged = merge_pass.merge_features(features)
    counts = [len(one) for one in merged]
    # Images of different length go through the projector as one row.
    same = len(set(counts)) == 1
    batch = torch.stack(merged) if same else torch.cat(merged)[None]
    projected = project(batch)
    check_count(projected.shape[1], batch.shape[1])
    own = list(projected) if same else list(torch.split(projected[0], counts))
    sources, anchors = merge_pass.maps(len(merged), projected.device)
    return VisualTokens(own, sources, [merge_pass.schedule.tokens_in] * len(merged), anchors)


def shape_of_tile(shape: TowerShape, advice: str) -> TowerShape:
    """The numbers of a tile, from those of the tower; `advice` is for where it is refused.

    Raises:
        ValueError: the tokens of a tile are not its whole grid, which packing needs.
    """
    if shape.grid is None or shape.leading_kept:
        raise ValueError(
            f"a tile has {shape.n_tokens + shape.leading_kept} visual tokens where its grid of "
            f"patches is needed to arrange tiles; {advice}"
        )
    return dataclasses.replace(shape, packed=True)


def tile_canvases(tiles_high: int, tiles_wide: int, grid: tuple[int, int]) -> tuple[Tensor, ...]:
    """The planes of an image in tiles, as cells (`merge.tiles.PackedItem`).

    Args:
        tiles_high: rows of tiles; 0 where the overview is the only tile.
        tiles_wide: columns of tiles.
        grid: (rows, columns) of the patches of a tile.

    Returns:
        The overview [rows, columns] and, if there are more tiles, all of them side by side
        [tiles_high * rows, tiles_wide * columns]; int64.
    """
    rows, columns = grid
    overview = torch.arange(rows * columns).view(rows, columns)
    if not tiles_high:
        return (overview,)
    cells = torch.arange(tiles_high * tiles_wide * rows * columns)
    cells = cells.view(tiles_high, tiles_wide, rows, columns).permute(0, 2, 1, 3)
    return overview, cells.reshape(tiles_high * rows, tiles_wide * columns) + rows * columns


def frame_canvases(
    frames: int, grid: tuple[int, int]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The planes of a video whose frames have (rows, columns) patches, and the frame of each."""
    cells = torch.arange(frames * grid[0] * grid[1]).view(frames, *grid)
    return tuple(cells), tuple(range(frames))


def checked_pixels(
    pixel_values: Any, layout: str, dims: tuple[int, ...], name: str = "pixel_values"
) -> Tensor:
    """The pixel values, a tensor of one of the given numbers of axes with at least one image.

    Args:
        pixel_values: what the caller gave.
        layout: the axes, for the message.
        dims: numbers of axes.
        name: of the argument, for the message.

    Raises:
        ValueError: anything else.
    """
    good = isinstance(pixel_values, Tensor) and pixel_values.dim() in dims
    if good and len(pixel_values):
        tensor: Tensor = pixel_values
        return tensor
    shown = (
        f"a tensor of shape {tuple(pixel_values.shape)}"
        if isinstance(pixel_values, Tensor)
        else type(pixel_values).__name__
    )
    raise ValueError(
        f"{name} must be a tensor {layout} with at least one image, as the "
        f"model's processor makes them with return_tensors='pt'; got {shown}"
    )


def token_id(config: Any, kind: str) -> int:
    """The id of the placeholder for a kind ("image", "video").

    Raises:
        ValueError: the config names none.
    """
    for name in (f"{kind}_token_id", f"{kind}_token_index"):
        value = getattr(config, name, None)
        if value is not None:
            return int(value)
    raise ValueError(f"the model's config names no {kind}_token_id")
