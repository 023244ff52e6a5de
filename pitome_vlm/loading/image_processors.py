"""Image processors on their own: what they make of an image of a size, before there is any."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor

from ..releases import image_options, pixel_limits
from .checkpoints import existing, only_local, squeezed
from .images import ImageLimits

# Gemma 4's processor takes no other counts.
_SOFT_TOKENS = (70, 140, 280, 560, 1120)
# Neighbouring limits differ by this share, which is finer than what any processor rounds to.
_STEP = 0.01


@dataclass(frozen=True)
class SizeLimit:
    """An image processor's own option for how large an image may become.

    Attributes:
        name: of the option.
        values: what it may be, rising up to what it is.
        options: from a value to the processor's `images_kwargs`.
    """

    name: str
    values: Sequence[int]
    options: Callable[[int], dict[str, Any]]


def size_limit(processor: Any) -> SizeLimit | None:
    """The option of a processor that makes fewer tokens of an image by making it smaller.

    Args:
        processor: a processor, or the image processor in it.

    Returns:
        None where every image gets one size, or is cut into tiles of one size.
    """
    prepare = getattr(processor, "image_processor", processor)
    soft = getattr(prepare, "max_soft_tokens", None)
    if soft is not None:
        counts = [count for count in _SOFT_TOKENS if count <= soft]
        return SizeLimit("max_soft_tokens", counts, lambda count: {"max_soft_tokens": count})
    size = dict(getattr(prepare, "size", None) or {})
    fewest, most = size.get("shortest_edge"), size.get("longest_edge")
    if most is None:
        return None
    if fewest is None:
        # Pixtral's and Idefics' kinds: the longer side in pixels.
        return SizeLimit(
            "longest_edge", _rising(most), lambda side: {"size": {"longest_edge": side}}
        )
    if not hasattr(prepare, "merge_size"):
        return None
    return SizeLimit(
        "max_pixels", _rising(most), lambda pixels: pixel_limits(min(fewest, pixels), pixels)
    )


def _rising(most: int) -> list[int]:
    """Whole numbers from 1 to `most`, neighbours `_STEP` apart where that is more than 1."""
    values = [most]
    while values[-1] > 1:
        values.append(min(values[-1] - 1, round(values[-1] * (1 - _STEP))))
    return values[::-1]


def find_image_processor(path: str | os.PathLike[str]) -> Any | None:
    """The image processor of a checkpoint, without its tokenizer.

    Args:
        path: a folder, or a name on the Hugging Face hub.

    Returns:
        None where the checkpoint has none, or one that needs a library which is not installed.
    """
    name = existing(path)
    try:
        return AutoImageProcessor.from_pretrained(name, local_files_only=only_local(name))
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError):
        return None


def blank_inputs(
    processor: Any, model_type: str, size: tuple[int, int], images: int = 1, rows: int = 1
) -> dict[str, Tensor]:
    """What a processor makes of white images.

    How images are resized and cut is nowhere else but in the code of every processor.

    Args:
        processor: a processor, or the image processor in it.
        model_type: of the model, whose processor passes options to its image processor.
        size: (height, width) of every image in pixels.
        images: of every row.
        rows: prompts that have so many images.

    Raises:
        ValueError: more pixels than an image may have, or a size that the processor refuses.
    """
    height, width = size
    most = ImageLimits().max_pixels
    if height * width > most:
        raise ValueError(
            f"an image of {width} x {height} pixels has {height * width:,} of them, at most "
            f"{most:,} are read; give a smaller size"
        )
    # Black tiles may count as padding.
    blank = Image.new("RGB", (width, height), "white")
    return processed(processor, model_type, [[blank] * images] * rows)


def processed(processor: Any, model_type: str, images: list[list[Image.Image]]) -> dict[str, Any]:
    """What a processor makes of the images of every row, without any text.

    Args:
        processor: a processor, or the image processor in it.
        model_type: of the model, whose processor passes options to its image processor.
        images: of every row.

    Raises:
        ValueError: the processor refuses them.
    """
    prepare = getattr(processor, "image_processor", processor)
    options = dict(image_options(processor, model_type)) | {"return_tensors": "pt"}
    try:
        return dict(prepare(images=images, **options))
    except MemoryError:
        raise
    except Exception as error:
        # Image processors fail in many ways at sizes that they cannot resize.
        width, height = images[0][0].size
        raise ValueError(
            f"the image processor refuses an image of {width} x {height} pixels: {squeezed(error)}"
        ) from error
