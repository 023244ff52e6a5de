"""Images: read within limits, or refused with a message of one line.

Every command, training, tuning and lmms-eval read images here, so that an image has the same pixels
in whatever form it comes. Nothing is fetched from the network.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import threading
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from ..common import shown, whole_number

_DECODING = threading.Lock()
# Of a part of a path on common file systems.
_LONGEST_NAME = 255
# Of PNG, JPEG, GIF, WEBP, BMP and TIFF.
_BASE64_STARTS = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "Qk0", "SUkqA", "TU0AK")
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


# Where an image comes from. A mapping is what datasets store: {"bytes": ..., "path": ...}, of which
# one may be None.
ImageSource = str | os.PathLike[str] | bytes | BinaryIO | Image.Image | Mapping[str, Any]


def load_image(source: ImageSource, limits: ImageLimits = _DEFAULT_LIMITS) -> Image.Image:
    """Read one image; the same pixels in whatever form it is given.

    EXIF orientation is applied. Transparency becomes white, as in the newest transformers; its
    older releases drop it, which shows whatever colour lies under transparent pixels. 16-bit grey
    is scaled to 8 bits, float grey in 0..1 to 0..255, where Pillow would clip.

    Args:
        source: a local file; its content in bytes; an open binary file, read from its current
            position; a Pillow image, which is left as it is; or a mapping with "bytes" or "path".
        limits: on bytes and pixels of what is still encoded. A Pillow image may have any size.

    Returns:
        An RGB image, decoded and independent of the source.

    Raises:
        ImageError: missing, not a regular file, empty, too large, truncated, not an image in one
            of `FORMATS`, or with values that have no 8-bit meaning.
        TypeError: none of these forms.
    """
    if isinstance(source, Mapping):
        source = _inside(source)
    if isinstance(source, Image.Image):
        return _decoded(_printable(getattr(source, "filename", "") or "the Pillow image"), source)
    name, content = _read(source, limits)
    return _decoded(name, content, limits)


def locate(source: Any, folder: str | os.PathLike[str] | None) -> str | bytes | Image.Image:
    """A source that can be read many times and from any working directory; nothing is decoded.

    Args:
        source: of an image, see `load_image`.
        folder: what paths are relative to; None if there is no such folder.

    Returns:
        An absolute path, or what was given as bytes or Pillow image.

    Raises:
        ImageError: not a form of an image, or the path of no file.
    """
    if isinstance(source, Mapping):
        source = _inside(source)
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if not isinstance(source, (str, os.PathLike)) or not os.fspath(source):
        raise ImageError(f"an image must be a path, bytes or a Pillow image, got {shown(source)}")
    given = os.fspath(source)
    _refuse_text(given)
    path = Path(given).expanduser()
    if folder is None and not path.is_absolute():
        raise ImageError(
            f"{_printable(given)}: a relative path, but the data has no folder; give image_folder"
        )
    path = Path(folder or "").expanduser() / path
    try:
        found = path.is_file()
    except (OSError, ValueError):
        # Too long for a file system, or a character that no path can have.
        found = False
    if not found:
        raise ImageError(f"no such image file: {_printable(str(path))}")
    return str(path.absolute())


def _inside(source: Mapping[str, Any]) -> Any:
    """The bytes of a mapping, else its path."""
    content, path = source.get("bytes"), source.get("path")
    if content is not None and not isinstance(content, (bytes, bytearray, memoryview)):
        raise ImageError(
            f"bytes of an image must be bytes, got {shown(content)}; in a JSON file give a path"
        )
    if content is None and not (isinstance(path, (str, os.PathLike)) and os.fspath(path)):
        raise ImageError(
            f"an image as a mapping needs bytes, or a path that is a text, got {shown(source)}"
        )
    return path if content is None else content


def _decoded(
    name: str, given: bytes | Image.Image, limits: ImageLimits = _DEFAULT_LIMITS
) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # Pillow warns at a size limit of its own, and about broken metadata.
            warnings.simplefilter("ignore")
            image = given if isinstance(given, Image.Image) else _open(name, given, limits)
            return _as_rgb(name, image)
    except (ImageError, MemoryError):
        raise
    except Exception as error:
        # On broken files decoders raise OSError, SyntaxError, struct.error, IndexError and more.
        raise ImageError(
            f"{name}: the file is damaged or cut off ({_one_line(error)}); save the image again "
            f"as one of {', '.join(FORMATS)}"
        ) from error


def _read(source: Any, limits: ImageLimits) -> tuple[str, bytes]:
    """The name for messages and at most `max_bytes` bytes."""
    if isinstance(source, (str, os.PathLike)):
        return _read_path(source, limits)
    if isinstance(source, (bytes, bytearray, memoryview)):
        _check_bytes("the image in memory", len(source), limits)
        return "the image in memory", bytes(source)
    if not hasattr(source, "read"):
        raise TypeError(
            "an image must be a path, bytes, a binary file, a Pillow image or a mapping with bytes "
            f"or path, got {type(source).__name__}"
        )
    name = _printable(str(getattr(source, "name", "uploaded file")))
    # One byte more than allowed tells a file that is too large from one that just fits.
    content = source.read(limits.max_bytes + 1)
    if not isinstance(content, bytes):
        raise TypeError(f"{name}: open the file in binary mode ('rb'), not as text")
    _check_bytes(name, len(content), limits, at_least=True)
    return name, content


def _read_path(path: str | os.PathLike[str], limits: ImageLimits) -> tuple[str, bytes]:
    name = _printable(os.fspath(path))
    _refuse_text(os.fspath(path))
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
        # ValueError: a NUL character in the path. The system's message repeats the path.
        said = _one_line(getattr(error, "strerror", None) or error)
        raise ImageError(f"{name}: cannot be read ({said})") from error
    _check_bytes(name, len(content), limits)
    return name, content


def _refuse_text(path: str) -> None:
    """Refuse addresses, and images written as text."""
    if re.match(r"data:[^,]*;base64,", path) or (
        len(path) > _LONGEST_NAME and path.startswith(_BASE64_STARTS)
    ):
        raise ImageError(
            f"{_printable(path)}: an image as base64 text where a path is wanted; decode it "
            "(base64.b64decode) and save it as a file, or give the bytes"
        )
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", path):
        advice = "" if path.startswith("file:") else "download the image and "
        raise ImageError(f"{_printable(path)}: URLs are not fetched; {advice}give its path")


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


def _as_rgb(name: str, image: Image.Image) -> Image.Image:
    _load(image)
    image = _upright(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(name, image)
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(paper, image)
    return image.convert("RGB")


def _load(image: Image.Image) -> None:
    with _complete_files_only():
        name = getattr(image, "filename", "")
        try:
            if name:
                # With a name Pillow maps the file into memory, and mixes up the sides of TIFFs
                # that have to be turned.
                image.filename = ""  # type: ignore[attr-defined]
            image.load()
        finally:
            if name:
                image.filename = name  # type: ignore[attr-defined]


def _eight_bits(name: str, image: Image.Image) -> Image.Image:
    """Grey of 16 bits, or of floats in 0..1, scaled to L or LA; Pillow would clip it at 255."""
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F":
        if not (low >= 0 and high <= 1):
            raise ImageError(
                f"{name}: float pixels must be in 0..1, got {low:g} to {high:g}; scale them, or "
                "convert the image to 8 bits (mode L) first"
            )
        grey = np.rint(values * 255)
    else:
        # Mode I has 32 bits. Small values may mean 8 bits as well as nearly black in 16.
        if image.mode == "I" and not (low == high == 0 or (low >= 0 and 255 < high <= 65535)):
            raise ImageError(
                f"{name}: 32-bit integer pixels are read as 16-bit grey (0..65535), but these are "
                f"{low} to {high}; convert the image to 8 bits (mode L) or 16 bits (I;16) first"
            )
        grey = values >> 8
    scaled = Image.fromarray(grey.astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        scaled.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return scaled


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = image.getexif().get(0x0112)
    except Exception:
        # A broken EXIF block does not affect the pixels; the image is used as stored.
        return image
    return ImageOps.exif_transpose(image) if turn in range(2, 9) else image


def _printable(name: str) -> str:
    """A file name for a message of one line; names may contain line breaks, or be no names."""
    if len(name) > _LONGEST_NAME:
        return shown(name)
    return name if name.isprintable() else repr(name)


def _one_line(error: object) -> str:
    text = " ".join(str(error).split())
    return text or type(error).__name__
