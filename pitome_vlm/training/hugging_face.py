"""Training conversations from Hugging Face datasets; images stay stored until they are needed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common import require
from ..loading.checkpoints import hub_failure, squeezed
from ..loading.images import ImageError, locate
from ..loading.records import DataError, check_source
from .conversations import Conversation, parse
from .examples import Conversations, Listed, existing_folder, located


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
    folder = Path() if image_folder is None else existing_folder(image_folder)
    return checked_dataset(dataset, folder.absolute(), text_only, name)


def checked_dataset(
    dataset: Any, folder: Path | None, text_only: bool, name: str | None
) -> Conversations:
    """`from_dataset`, where `folder` is None if relative paths belong to none."""
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
            inside.append([located(image, folder, where) for image in given])
        for file in files:
            if file is not None:
                located(file, folder, where)
    images = Listed(inside) if shown is None else _Stored(stored, shown, folder)
    return Conversations(name, str(dataset._fingerprint), rows, images)


def _column(name: str, columns: list[str], names: tuple[str, str]) -> str | None:
    found = [column for column in names if column in columns]
    if len(found) > 1:
        raise DataError(f"{name}: has columns {' and '.join(found)}; remove one of them")
    return found[0] if found else None


def load_dataset(path: Path, name: str, split: str) -> Any:
    """One split of a saved dataset (`path` is its folder) or of the dataset `name` on the hub.

    Raises:
        DataError: it cannot be loaded, or has no such split.
        FileNotFoundError: the name is that of a file that is not there.
        ImportError: the `datasets` library is not installed.
    """
    check_source(name)
    require("datasets", "train", f"{name} is not a file; a Hugging Face dataset")
    import datasets

    try:
        if path.is_dir() and (path / "state.json").is_file():
            return datasets.load_from_disk(str(path))
        if path.is_dir() and (path / "dataset_dict.json").is_file():
            return _one_split(datasets.load_from_disk(str(path)), name, split)
        if not path.is_dir():
            _check_reachable(name, Path(datasets.config.HF_DATASETS_CACHE))
        return datasets.load_dataset(name, split=split)
    except DataError:
        raise
    except (OSError, ValueError, KeyError) as error:
        message = " ".join(str(error).split())[:200]
        raise DataError(f"{name}: cannot be loaded as a dataset: {message}") from error


def _check_reachable(name: str, cache: Path) -> None:
    """Refuse a name that is in no cache where the hub cannot be asked.

    Raises:
        DataError: it cannot.
    """
    failure = hub_failure(name, "README.md", repo_type="dataset")
    if failure is not None and not (cache / name.replace("/", "___")).is_dir():
        raise DataError(
            f"{name} is no file or folder, and as a dataset on the hub it can neither be asked for "
            f"nor was it downloaded before: {squeezed(failure)}"
        )


def _one_split(splits: Any, name: str, split: str) -> Any:
    if split not in splits:
        raise DataError(f"{name}: has no split {split!r}, but {', '.join(splits)}")
    return splits[split]


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
