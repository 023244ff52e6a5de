"""The simplest way to fewer visual tokens: a smaller image.

The baseline that VTC-Bench (arXiv 2510.07143) asks every method to beat: the pixels that the model
would see are scaled down, the tower interpolates its position embeddings, nothing is merged.
For models of the LLaVA kind with a CLIP, SigLIP or DINOv2 tower, one image per prompt.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import HFLlavaAdapter, find_adapter
from ..common import whole_number
from ..wrapping.wrap import base_model

# Sides of a grid may differ by this factor, as one step of rounding makes them.
_MOST_OBLONG = 1.5
_OPTION = "interpolate_pos_encoding"


def grid_for(tokens: int, full: tuple[int, int]) -> tuple[int, int]:
    """The smallest nearly square grid of at least `tokens` patches.

    At least, so that a comparison at equal tokens never gives the smaller image fewer.

    Args:
        tokens: 1..rows * columns.
        full: rows and columns of the tower's own grid.

    Returns:
        Rows and columns.
    """
    whole_number("tokens", tokens, low=1, high=full[0] * full[1])
    fitting = [
        (rows, columns)
        for rows in range(1, full[0] + 1)
        for columns in range(1, full[1] + 1)
        if rows * columns >= tokens and max(rows, columns) <= _MOST_OBLONG * min(rows, columns)
    ]
    return min(fitting or [full], key=lambda grid: (grid[0] * grid[1], abs(grid[0] - grid[1])))


def shrunk(model: Any, batch: Mapping[str, Tensor], tokens: int) -> tuple[dict[str, Tensor], int]:
    """The inputs of a batch for images scaled down to about `tokens` patches.

    Args:
        model: of the LLaVA kind, not wrapped.
        batch: processor output with input_ids and attention_mask [B, T], pixel_values
            [B, 3, H, W], one image per row.
        tokens: patches per image at least.

    Returns:
        The same with smaller images and fewer placeholders, and the number of tokens per image.

    Raises:
        ValueError: a model or a batch of another kind.
    """
    base = base_model(model)
    adapter = find_adapter(base)
    if type(adapter) is not HFLlavaAdapter:
        raise ValueError(
            f"{type(base).__name__} brings every image, or every tile of one, to one size, so a "
            "scaled image has as many tokens"
        )
    pixels, ids = batch["pixel_values"], batch["input_ids"]
    if pixels.ndim != 4 or len(pixels) != len(ids):
        raise ValueError(
            "pixel_values must be [rows, 3, height, width] with one image per row, got "
            f"{list(pixels.shape)} for {len(ids)} rows"
        )
    patch = adapter.parts(base).vision_config.patch_size
    full = pixels.shape[-2] // patch, pixels.shape[-1] // patch
    rows, columns = grid_for(tokens, full)
    is_image = ids == adapter.placeholder_ids(base)["image"]
    # A CLS token that the language model sees stays.
    leading = int(is_image[0].sum()) - full[0] * full[1]
    count = rows * columns + leading
    kept = ~is_image | (is_image.cumsum(-1) <= count)
    smaller = torch.nn.functional.interpolate(
        pixels.float(), (rows * patch, columns * patch), mode="bicubic", antialias=True
    )
    found = dict(batch) | {"pixel_values": smaller.to(pixels.dtype)}
    for name in ("input_ids", "attention_mask"):
        found[name] = batch[name][kept].view(len(ids), -1)
    return found, count


@contextmanager
def any_image_size(model: Any) -> Iterator[None]:
    """Within it the model's tower takes images of other sizes than it was trained on.

    Raises:
        ValueError: the tower cannot interpolate its position embeddings.
    """
    tower: nn.Module = find_adapter(base := base_model(model)).parts(base).vision_tower
    if _OPTION not in inspect.signature(tower.forward).parameters:
        embeddings: Any = getattr(tower, "embeddings", None)
        if hasattr(embeddings, _OPTION):
            # DINOv2's have no option: they interpolate wherever an image has another size.
            yield
            return
        raise ValueError(
            f"{type(tower).__name__} cannot interpolate its position embeddings; "
            "the resize baseline is for CLIP, SigLIP and DINOv2 towers"
        )

    def interpolate(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {_OPTION: True}

    handle = tower.register_forward_pre_hook(interpolate, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
