"""What an image of a size is made of: one sequence of tokens, or tiles that are merged apart."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..adapters import find_adapter
from ..loading.image_processors import blank_inputs
from ..merge.config import MergeConfig
from ..merge.counts import Footprint, TokenCount
from ..wrapping.encode import checked_size, planned
from ..wrapping.wrap import base_model


def asks_processor(model: nn.Module) -> bool:
    """Whether only a model's image processor knows how many tokens an image of a size has."""
    return find_adapter(base_model(model)).sized_by_processor


def pieces_of(
    model: nn.Module,
    *,
    image_size: tuple[int, int] | None = None,
    frames: int | None = None,
    image_processor: Any = None,
) -> tuple[Footprint, ...]:
    """Token counts of everything that is merged on its own in one image or video.

    Args:
        model: a supported model, wrapped or not; its weights may be on the meta device.
        image_size: (height, width) in pixels, None for a typical image, or for a tile where the
            model cuts images into tiles.
        frames: of a video, None for an image.
        image_processor: the model's processor, or the image processor in it, which is asked how
            many tokens an image of that size has. Without one, sizes are those after its resizing
            and an image is one tile.

    Raises:
        TypeError: not a supported model.
        ValueError: a size below one pixel or one that the processor refuses, or frames of a model
            that takes no videos.
    """
    base: Any = base_model(model)
    adapter = find_adapter(base)
    size = None if image_size is None else checked_size(image_size)
    asked = size or adapter.default_image_size
    if image_processor is None or frames is not None or asked is None or not asks_processor(base):
        return (adapter.footprint(base, image_size=size, frames=frames),)
    made = blank_inputs(image_processor, base.config.model_type, asked)
    given = {name: made[name] for name in adapter.vision_inputs if name in made}
    return tuple(adapter.footprints(base, given)["image"])


def planned_total(
    model: nn.Module, config: MergeConfig, pieces: tuple[Footprint, ...]
) -> TokenCount:
    """Tokens of all pieces of an image together under `wrap(model, config=config)`.

    Raises:
        TypeError: not a supported model.
        ValueError: the budget does not fit.
    """
    count = planned(model, config).new_pass().count
    counts = [count(piece) for piece in pieces]
    fewest = [one.fewest for one in counts if one.fewest is not None]
    return TokenCount(
        sum(one.full for one in counts),
        sum(one.out for one in counts),
        sum(fewest) if len(fewest) == len(counts) else None,
    )
