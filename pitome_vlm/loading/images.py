"""Pictures from outside: read within limits, or refused in one clear line.

Knows: files, formats, and what can be wrong with them. Does not know: models or processors.
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

_DECODING = threading.Lock()
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")


class ImageError(ValueError):
    """A picture that cannot be used; the message names the file, what is wrong and the limit."""


@dataclass(frozen=True)
class ImageLimits:
    """What is accepted. Only the first frame of an animation or of a file of pages is read.

    Attributes:
        max_bytes: size of the file, >= 1.
        max_pixels: width x height, >= 1; checked before anything is decoded. Pillow itself
            refuses more than about 179 million pixels whatever stands here.
    """

    max_bytes: int = 20_000_000
    max_pixels: int = 40_000_000

    def __post_init__(self) -> None:
        for field, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{field} must be a whole number >= 1, got {value!r}")


_DEFAULT_LIMITS = ImageLimits()


def load_image(
    path_or_file: str | os.PathLike[str] | BinaryIO, limits: ImageLimits = _DEFAULT_LIMITS
) -> Image.Image:
    """Read one picture.

    EXIF orientation is applied, transparency is put on white, 16-bit grey is scaled to 8 bit.

    Args:
        path_or_file: a local file, or an open binary file that is read from where it stands.
        limits: what is accepted.

    Returns:
        An RGB picture, decoded and independent of the file.

    Raises:
        ImageError: missing, not a regular file, empty, too large, truncated, or no picture in
            one of `FORMATS`.
    """
    name, content = _read(path_or_file, limits)
    try:
        with warnings.catch_warnings():
            # Pillow warns of sizes at a limit that is not ours, and of broken metadata.
            warnings.simplefilter("ignore")
            return _as_rgb(_open(name, content, limits))
    except (ImageError, MemoryError):
        raise
    except Exception as error:
        # Decoders raise whatever a broken file leads them into: OSError, SyntaxError,
        # struct.error, IndexError and more. For the caller it is one thing: a broken file.
        raise ImageError(
            f"{name}: the file is damaged or cut off ({_one_line(error)}); save the picture again "
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
        raise ImageError(
            f"{name}: addresses are not fetched; download the picture and give its path"
        )
    file = Path(path).expanduser()
    try:
        if not file.exists():
            raise ImageError(f"{name}: no such file; give the path of a picture")
        if not file.is_file():
            kind = "a folder" if file.is_dir() else "no regular file"
            raise ImageError(f"{name}: is {kind}; give the path of a picture file")
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
            "smaller picture or raise ImageLimits(max_bytes=...)"
        )


def _open(name: str, content: bytes, limits: ImageLimits) -> Image.Image:
    """The picture's header, checked against the limits; pixels are not decoded yet."""
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError as error:
        # Pillow knows the size by now but hands out no picture, only this message.
        found = re.search(r"\d+", str(error))
        shown = found.group() if found else f"more than {Image.MAX_IMAGE_PIXELS}"
        raise _too_many_pixels(name, shown, limits) from error
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{name}: not a picture, or damaged from its first bytes on; allowed formats: "
            f"{', '.join(FORMATS)}"
        ) from error
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(
            f"{name}: the picture is {width} x {height} pixels; allowed: at least 1 x 1"
        )
    if width * height > limits.max_pixels:
        raise _too_many_pixels(name, f"{width} x {height} = {width * height}", limits)
    return image


def _too_many_pixels(name: str, shown: str, limits: ImageLimits) -> ImageError:
    return ImageError(
        f"{name}: the picture has {shown} pixels; allowed: 1..{limits.max_pixels} pixels. Scale "
        "it down first (a model looks at a few hundred thousand)"
    )


@contextlib.contextmanager
def _complete_files_only() -> Iterator[None]:
    """Let Pillow refuse cut-off files even where another library told it not to.

    lmms-eval sets this switch of Pillow when it is imported, for the whole process; a picture
    whose lower half is grey would then pass for a good one. The switch is put back.
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
        # Pillow clips 16-bit grey at 255, which makes nearly every such picture white.
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
        # A broken EXIF block says nothing about the pixels; the picture is used as it is stored.
        return image


def _printable(name: str) -> str:
    """A file's name for a message of one line; names may hold line breaks."""
    return name if name.isprintable() else repr(name)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text or type(error).__name__
