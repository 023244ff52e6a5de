"""Where training conversations come from: LLaVA's JSON files, Hugging Face datasets, lists.

Everything is checked when a source is opened; images are read when they are needed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from ..common import check_range, require
from ..loading.images import ImageError, load_image, locate
from ..loading.records import DataError, check_source, parse_records
from .conversations import Conversation, parse


@dataclass(frozen=True)
class Example:
    """A conversation with its images, read."""

    conversation: Conversation
    images: tuple[Image.Image, ...]


class Conversations(Dataset[Example]):
    """Checked conversations, a map-style dataset for any loader; pickles for its workers.

    Attributes:
        name: of the file or dataset, for display.
        fingerprint: changes with the content; a run is only resumed with the same one.
        conversations: all of them, without images.
    """

    def __init__(
        self,
        name: str,
        fingerprint: str,
        conversations: Sequence[Conversation],
        images: Callable[[int], Sequence[Any]],
    ) -> None:
        """Put checked conversations and their images together.

        Args:
            name: for display.
            fingerprint: of the content.
            conversations: at least one.
            images: from the number of a conversation to its images in forms of `load_image`;
                must pickle.

        Raises:
            DataError: no conversation.
        """
        self.name, self.fingerprint = name, fingerprint
        self.conversations = conversations
        self._images = images
        if not conversations:
            raise DataError(f"{name}: holds no conversation")

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> Example:
        conversation = self.conversations[index]
        try:
            images = tuple(load_image(value) for value in self._images(index))
        except ImageError as error:
            raise DataError(f"{conversation.where}: {error}") from error
        return Example(conversation, images)

    @property
    def has_text_only(self) -> bool:
        """Whether some conversation has no image."""
        return any(not conversation.images for conversation in self.conversations)

    def split(self, fraction: float, seed: int = 0) -> tuple[Conversations, Conversations]:
        """(rest, held out), drawn at random; the same seed draws the same.

        Args:
            fraction: share to hold out, in (0, 1).
            seed: random seed of the draw.

        Raises:
            TypeError: the fraction is no number.
            ValueError: the fraction is out of range, or leaves one side empty.
        """
        import random

        check_range("val_fraction", fraction, 0, 1, open_ends=True)
        held = max(1, round(fraction * len(self)))
        if held >= len(self):
            raise ValueError(f"val_fraction={fraction} leaves none of {len(self)} to train on")
        order = list(range(len(self)))
        random.Random(f"pitome-vlm/{seed}").shuffle(order)
        return (
            self._part(sorted(order[held:]), f"{self.name} without {held} held out"),
            self._part(sorted(order[:held]), f"{held} held out of {self.name}"),
        )

    def _part(self, chosen: list[int], name: str) -> Conversations:
        digest = hashlib.sha256(f"{self.fingerprint} {chosen}".encode()).hexdigest()
        rows = [self.conversations[index] for index in chosen]
        return Conversations(name, digest, rows, _Chosen(self._images, chosen))


@dataclass(frozen=True)
class _Listed:
    """Images in memory or in files."""

    images: list[list[Any]]

    def __call__(self, index: int) -> list[Any]:
        return self.images[index]

    def __getstate__(self) -> dict[str, Any]:
        # Pickled, a Pillow image loses its orientation or the transparency of its palette.
        plain = [[_plain(image) for image in images] for images in self.images]
        return {"images": plain}


@dataclass(frozen=True)
class _Chosen:
    """Some of the images."""

    images: Callable[[int], Sequence[Any]]
    chosen: list[int]

    def __call__(self, index: int) -> Sequence[Any]:
        return self.images(self.chosen[index])


@dataclass(frozen=True)
class _Stored:
    """The images of a Hugging Face dataset in Arrow's format: bytes or paths, not decoded."""

    stored: Any
    column: str
    folder: Path | None

    def __call__(self, index: int) -> list[Any]:
        value = self.stored[index].column(self.column)[0].as_py()
        values = value if isinstance(value, list) else [value]
        return [locate(one, self.folder) for one in values if one is not None]


def _plain(image: Any) -> Any:
    return load_image(image) if isinstance(image, Image.Image) else image


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
        dataset = _load_dataset(path, os.fspath(source), split)
        own = path if path.is_dir() else None
        folder = own if image_folder is None else _folder(image_folder)
        return _from_dataset(dataset, folder, text_only, str(source))
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
    folder = file.parent if image_folder is None else _folder(image_folder)
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
    folder = Path() if image_folder is None else _folder(image_folder)
    return _checked(name, None, numbered, folder, text_only)


def from_dataset(
    dataset: Any,
    *,
    image_folder: str | os.PathLike[str] | None = None,
    text_only: bool = False,
    name: str | None = None,
) -> Conversations:
    """A Hugging Face dataset with `messages` (or `conversations`) and `images` (or `image`).

    Args:
        dataset: a `datasets.Dataset`; streaming ones have no length and cannot be used.
        image_folder: folder that image paths are relative to; None for the working directory.
        text_only: accept rows without an image.
        name: for display.

    Raises:
        DataError: the columns or a row are wrong; the message names the row, from 0.
        FileNotFoundError: no such folder.
        TypeError: a dataset dict, a streaming dataset, or one with a transform.
    """
    folder = Path() if image_folder is None else _folder(image_folder)
    return _from_dataset(dataset, folder.absolute(), text_only, name)


def _from_dataset(
    dataset: Any, folder: Path | None, text_only: bool, name: str | None
) -> Conversations:
    columns: Any = getattr(dataset, "column_names", None)
    if not isinstance(columns, list) or not hasattr(dataset, "__len__"):
        raise TypeError(
            "dataset must have one split and a known length, for instance "
            f"load_dataset(name, split='train'); got {type(dataset).__name__}"
        )
    if dataset.format["type"] == "custom":
        raise TypeError(
            "dataset has a transform (set_transform or with_transform), which training would not "
            "apply; apply it with dataset.map(...), or remove it with dataset.reset_format()"
        )
    name = name or getattr(dataset.info, "dataset_name", None) or "dataset"
    turns, shown = (
        _column(name, columns, both)
        for both in (("messages", "conversations"), ("images", "image"))
    )
    if turns is None or (shown is None and not text_only):
        raise DataError(
            f"{name}: needs a column messages (or conversations) and a column images (or image), "
            f"has {', '.join(columns)}"
        )
    # Arrow gives images as stored (bytes or paths), so that `load_image` can apply its limits.
    stored = dataset.with_format("arrow")
    rows: list[Conversation] = []
    inside: list[list[Any]] = []
    for index, (talk, files) in enumerate(_rows(stored, name, turns, shown)):
        where = f"{name} row {index}"
        record = {turns: talk, "images": [...] * len(files)}
        conversation, given = parse(record, where, text_only=text_only)
        rows.append(conversation)
        if shown is None:
            inside.append([_located(image, folder, where) for image in given])
        for file in files:
            if file is not None:
                _located(file, folder, where)
    images = _Listed(inside) if shown is None else _Stored(stored, shown, folder)
    return Conversations(name, str(dataset._fingerprint), rows, images)


def _column(name: str, columns: list[str], names: tuple[str, str]) -> str | None:
    found = [column for column in names if column in columns]
    if len(found) > 1:
        raise DataError(f"{name}: has columns {' and '.join(found)}; remove one of them")
    return found[0] if found else None


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
        found = [_located(image, folder, where) for image in given]
        rows.append(conversation)
        images.append(found)
        if digest is None:
            shown = [_content(image, where) for image in found]
            content.update(repr((conversation.messages, shown)).encode())
    return Conversations(name, digest or content.hexdigest(), rows, _Listed(images))


def _located(image: Any, folder: Path | None, where: str) -> Any:
    try:
        return locate(image, folder)
    except ImageError as error:
        raise DataError(f"{where}: {error}") from error


def _content(image: Any, where: str) -> str:
    """What tells an image from others in a fingerprint."""
    if isinstance(image, Image.Image):
        try:
            pixels = load_image(image)
        except ImageError as error:
            raise DataError(f"{where}: {error}") from error
        return f"{pixels.size} {hashlib.sha256(pixels.tobytes()).hexdigest()}"
    return hashlib.sha256(image).hexdigest() if isinstance(image, bytes) else str(image)


def _folder(path: str | os.PathLike[str]) -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"image_folder {folder} is not a folder")
    return folder


def _load_dataset(path: Path, name: str, split: str) -> Any:
    check_source(name)
    require("datasets", "train", f"{name} is not a file; a Hugging Face dataset")
    import datasets

    try:
        if path.is_dir() and (path / "state.json").is_file():
            return datasets.load_from_disk(str(path))
        if path.is_dir() and (path / "dataset_dict.json").is_file():
            return _one_split(datasets.load_from_disk(str(path)), name, split)
        return datasets.load_dataset(name, split=split)
    except DataError:
        raise
    except (OSError, ValueError, KeyError) as error:
        message = " ".join(str(error).split())[:200]
        raise DataError(f"{name}: cannot be loaded as a dataset: {message}") from error


def _one_split(splits: Any, name: str, split: str) -> Any:
    if split not in splits:
        raise DataError(f"{name}: has no split {split!r}, but {', '.join(splits)}")
    return splits[split]


def _is_iterable(value: Any) -> bool:
    return isinstance(value, Iterable) or hasattr(value, "__getitem__")


def _rows(
    stored: Any, name: str, turns: str, images: str | None
) -> Iterator[tuple[Any, list[Any]]]:
    """Turns of every row, and for each image its path, None if the dataset holds its bytes."""
    wanted = [turns] if images is None else [turns, images]
    for batch in stored.select_columns(wanted).iter(batch_size=1000):
        talks = batch.column(turns).to_pylist()
        if images is None:
            yield from ((talk, []) for talk in talks)
            continue
        column = batch.column(images).combine_chunks()
        if hasattr(column, "value_lengths"):
            counts = [length or 0 for length in column.value_lengths().to_pylist()]
            column = column.flatten()
        else:
            counts = [int(there) for there in column.is_valid().to_pylist()]
            column = column.drop_null()
        try:
            files = iter(_files(column))
        except ImageError as error:
            raise DataError(f"{name}: the column {images} {error}") from error
        for talk, count in zip(talks, counts, strict=True):
            yield talk, [next(files) for _ in range(count)]


def _files(column: Any) -> list[str | None]:
    """The path of every image, None if its bytes are stored."""
    if "binary" in str(column.type):
        return [None] * len(column)
    kind = str(column.type)
    if "string" in kind and not column.type.num_fields:
        return list(column.to_pylist())
    fields = [field.name for field in column.type] if kind.startswith("struct") else []
    if "bytes" not in fields:
        raise ImageError(f"must hold images, as paths or bytes, but holds {kind[:100]}")
    stored = column.field("bytes").is_valid().to_pylist()
    paths = column.field("path").to_pylist()
    return [None if there else path or "" for there, path in zip(stored, paths, strict=True)]
