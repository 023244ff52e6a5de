"""Image files: read within limits, or refused with a message of one line.

Nothing is fetched from the network.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from ..common import whole_number

_DECODING = threading.Lock()
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")


class ImageError(ValueError):
    """An image that cannot be used; the message names the file, the problem and the limit."""


@dataclass(frozen=True)
class ImageLimits:
    """Limits for image files. Only the first frame or page of a file is read.

    Attributes:
        max_bytes: size of the file, >= 1.
        max_pixels: width x height, >= 1; checked before anything is decoded. Pillow itself
            refuses more than about 179 million pixels, whatever this limit is.
    """

    max_bytes: int = 20_000_000
    max_pixels: int = 40_000_000

    def __post_init__(self) -> None:
        for field, value in vars(self).items():
            whole_number(field, value, 1)


_DEFAULT_LIMITS = ImageLimits()


def load_image(
    path_or_file: str | os.PathLike[str] | BinaryIO, limits: ImageLimits = _DEFAULT_LIMITS
) -> Image.Image:
    """Read one image.

    EXIF orientation is applied, transparency becomes white, 16-bit grey is scaled to 8 bits.

    Args:
        path_or_file: a local file, or an open binary file, read from its current position.
        limits: on bytes and pixels.

    Returns:
        An RGB image, decoded and independent of the file.

    Raises:
        ImageError: missing, not a regular file, empty, too large, truncated, or not an image in
            one of `FORMATS`.
    """
    name, content = _read(path_or_file, limits)
    try:
        with warnings.catch_warnings():
            # Pillow warns at a size limit of its own, and about broken metadata.
            warnings.simplefilter("ignore")
            return _as_rgb(_open(name, content, limits))
    except (ImageError, MemoryError):
        raise
    except Exception as error:
        # On broken files decoders raise OSError, SyntaxError, struct.error, IndexError and more.
        raise ImageError(
            f"{name}: the file is damaged or cut off ({_one_line(error)}); save the image again "
            f"as one of {', '.join(FORMATS)}"
        ) from error


def _read(
    path_or_file: str | os.PathLike[str] | BinaryIO, limits: ImageLimits
) -> tuple[str, bytes]:
    """The name for messages and at most `max_bytes` bytes."""
    if isinstance(path_or_file, (str, os.PathLike)):
        return _read_path(path_or_file, limits)
    if not hasattr(path_or_file, "read"):
        raise TypeError(
            f"path_or_file must be a path or a binary file, got {type(path_or_file).__name__}"
        )
    name = _printable(str(getattr(path_or_file, "name", "uploaded file")))
    # One byte more than allowed tells a file that is too large from one that just fits.
    content = path_or_file.read(limits.max_bytes + 1)
    if not isinstance(content, bytes):
        raise TypeError(f"{name}: open the file in binary mode ('rb'), not as text")
    _check_bytes(name, len(content), limits, at_least=True)
    return name, content


def _read_path(path: str | os.PathLike[str], limits: ImageLimits) -> tuple[str, bytes]:
    name = _printable(os.fspath(path))
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", name):
        raise ImageError(f"{name}: URLs are not fetched; download the image and give its path")
    file = Path(path).expanduser()
    try:
        if not file.exists():
            raise ImageError(f"{name}: no such file; give the path of an image")
        if not file.is_file():
            kind = "a folder" if file.is_dir() else "not a regular file"
            raise ImageError(f"{name} is {kind}; give the path of an image file")
        _check_bytes(name, file.stat().st_size, limits)
        with file.open("rb") as handle:
            content = handle.read(limits.max_bytes + 1)
    except ImageError:
        raise
    except (OSError, ValueError) as error:
        # ValueError: a NUL character in the path.
        raise ImageError(f"{name}: cannot be read ({_one_line(error)})") from error
    _check_bytes(name, len(content), limits)
    return name, content


def _check_bytes(name: str, size: int, limits: ImageLimits, *, at_least: bool = False) -> None:
    if size == 0:
        raise ImageError(
            f"{name}: the file is empty (0 bytes); allowed: 1..{limits.max_bytes} bytes"
        )
    if size > limits.max_bytes:
        shown = f"more than {limits.max_bytes}" if at_least else str(size)
        raise ImageError(
            f"{name}: the file has {shown} bytes; allowed: 1..{limits.max_bytes} bytes. Save a "
            "smaller image or raise ImageLimits(max_bytes=...)"
        )


def _open(name: str, content: bytes, limits: ImageLimits) -> Image.Image:
    """The image with its header checked against the limits; pixels are not decoded yet."""
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError as error:
        # Pillow knows the size here, but only gives it in this message.
        found = re.search(r"\d+", str(error))
        shown = found.group() if found else f"more than {Image.MAX_IMAGE_PIXELS}"
        raise _too_many_pixels(name, shown, limits) from error
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{name}: not an image, or damaged from the first bytes on; allowed formats: "
            f"{', '.join(FORMATS)}"
        ) from error
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"{name}: the image is {width} x {height} pixels; allowed: at least 1 x 1")
    if width * height > limits.max_pixels:
        raise _too_many_pixels(name, f"{width} x {height} = {width * height}", limits)
    return image


def _too_many_pixels(name: str, shown: str, limits: ImageLimits) -> ImageError:
    return ImageError(
        f"{name}: the image has {shown} pixels; allowed: 1..{limits.max_pixels} pixels. Scale "
        "it down first (models see a few hundred thousand)"
    )


@contextlib.contextmanager
def _complete_files_only() -> Iterator[None]:
    """Make Pillow refuse truncated files, even if another library has told it not to.

    Importing lmms-eval sets this switch for the whole process; an image whose lower half is grey
    would then be accepted. The switch is restored afterwards.
    """
    with _DECODING:
        lenient, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = lenient


def _as_rgb(image: Image.Image) -> Image.Image:
    with _complete_files_only():
        image.load()
    image = _upright(image)
    if image.mode.startswith("I"):
        # Pillow clips 16-bit grey at 255, which makes nearly every such image white.
        grey = np.clip(np.asarray(image, dtype=np.int64), 0, 65535) >> 8
        image = Image.fromarray(grey.astype(np.uint8))
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(paper, image)
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        # A broken EXIF block does not affect the pixels; the image is used as stored.
        return image


def _printable(name: str) -> str:
    """A file name for a message of one line; names may contain line breaks."""
    return name if name.isprintable() else repr(name)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text or type(error).__name__
