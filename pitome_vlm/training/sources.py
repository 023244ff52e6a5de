"""Where training conversations come from: LLaVA's JSON files, Hugging Face datasets, lists.

Everything is checked when a source is opened; images are read when they are needed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from ..loading.images import ImageError, load_image
from ..loading.records import DataError, parse_records
from .conversations import parse
from .examples import Conversations, Listed, existing_folder, located
from .hugging_face import checked_dataset, from_dataset, load_dataset


def open_conversations(
    source: Any,
    *,
    image_folder: str | os.PathLike[str] | None = None,
    split: str = "train",
    text_only: bool = False,
) -> Conversations:
    """Conversations from a file, dataset or list, checked to the last record.

    Args:
        source: a LLaVA JSON or JSONL file; a folder written by `Dataset.save_to_disk`; a dataset
            name on the hub; a `datasets.Dataset`; a list of records; or `Conversations`.
        image_folder: folder that image paths are relative to; None for that of the file or saved
            dataset. Relative paths of records in memory are then relative to the working
            directory, those of a dataset on the hub are refused.
        split: of a dataset that has several.
        text_only: accept records without an image.

    Raises:
        DataError: a record is wrong; the message names its line.
        FileNotFoundError: no such file.
        ImportError: the `datasets` library is needed and not installed.
    """
    if isinstance(source, Conversations):
        return source
    if isinstance(source, (str, os.PathLike)):
        path = Path(source).expanduser()
        if path.is_file():
            return read_llava(path, image_folder=image_folder, text_only=text_only)
        dataset = load_dataset(path, os.fspath(source), split)
        own = path if path.is_dir() else None
        folder = own if image_folder is None else existing_folder(image_folder)
        return checked_dataset(dataset, folder, text_only, str(source))
    if hasattr(source, "column_names"):
        return from_dataset(source, image_folder=image_folder, text_only=text_only)
    return from_records(source, image_folder=image_folder, text_only=text_only)


def read_llava(
    path: str | os.PathLike[str],
    *,
    image_folder: str | os.PathLike[str] | None = None,
    text_only: bool = False,
) -> Conversations:
    """LLaVA's instruction format: a JSON list of records, or one record per line (JSONL).

    Args:
        path: the file.
        image_folder: folder that image paths are relative to; None for the file's own.
        text_only: accept records without an image.

    Raises:
        DataError: the file or a record is wrong, or an image is missing.
        FileNotFoundError: no such file or folder.
    """
    file = Path(path)
    folder = file.parent if image_folder is None else existing_folder(image_folder)
    content = file.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return _checked(file.name, digest, parse_records(content, str(file)), folder, text_only)


def from_records(
    records: Iterable[Any],
    *,
    image_folder: str | os.PathLike[str] | None = None,
    text_only: bool = False,
    name: str = "records",
) -> Conversations:
    """Conversations from records in memory; images are in a form of `load_image`, but open files.

    Raises:
        DataError: a record is wrong; the message names its number, from 0.
        FileNotFoundError: no such folder.
        TypeError: no list of records.
    """
    if isinstance(records, Mapping) or hasattr(records, "columns") or not _is_iterable(records):
        raise TypeError(
            "training data must be a file, a dataset or a list of records, got "
            f"{type(records).__name__}"
        )
    numbered = ((f"{name}[{index}]", record) for index, record in enumerate(records))
    folder = Path() if image_folder is None else existing_folder(image_folder)
    return _checked(name, None, numbered, folder, text_only)


def _checked(
    name: str,
    digest: str | None,
    records: Iterable[tuple[str, Any]],
    folder: Path,
    text_only: bool,
) -> Conversations:
    rows, images, content = [], [], hashlib.sha256()
    for where, record in records:
        conversation, given = parse(record, where, text_only=text_only)
        found = [located(image, folder, where) for image in given]
        rows.append(conversation)
        images.append(found)
        if digest is None:
            shown = [_content(image, where) for image in found]
            content.update(repr((conversation.messages, shown)).encode())
    return Conversations(name, digest or content.hexdigest(), rows, Listed(images))


def _content(image: Any, where: str) -> str:
    """What tells an image from others in a fingerprint."""
    if isinstance(image, Image.Image):
        try:
            pixels = load_image(image)
        except ImageError as error:
            raise DataError(f"{where}: {error}") from error
        return f"{pixels.size} {hashlib.sha256(pixels.tobytes()).hexdigest()}"
    return hashlib.sha256(image).hexdigest() if isinstance(image, bytes) else str(image)


def _is_iterable(value: Any) -> bool:
    return isinstance(value, Iterable) or hasattr(value, "__getitem__")
