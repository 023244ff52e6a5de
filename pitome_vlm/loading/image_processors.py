"""Image processors on their own: what they make of an image of a size, before there is any."""

from __future__ import annotations

import os
from typing import Any

from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor

from ..releases import image_options
from .checkpoints import existing, only_local, squeezed
from .images import ImageLimits


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
