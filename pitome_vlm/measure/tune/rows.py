"""The user's questions: read from JSON or JSONL, checked, every image known by its content.

{"image": "cat.jpg", "question": "What is on the mat?", "answer": "a cat"}
{"images": ["a.png", "b.png"], "question": "Which is brighter?", "answer": ["a", "first"]}
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ...common import check_text, shown, whole_number
from ...loading.images import ImageError, ImageLimits, ImageSource, load_image, locate
from ...loading.records import parse_records

_IMAGES, _ANSWERS = ("image", "images"), ("answer", "answers")


@dataclass(frozen=True, eq=False)
class Row:
    """One question about one or more images.

    Attributes:
        images: at least one, each in a form of `load_image` that can be read again.
        question: text without image placeholders.
        answers: accepted answers; empty where the user gave none.
        source: where the row comes from, for messages.

    Raises:
        TypeError: `images` or `answers` is no tuple, a text is none, or an image is an open file.
        ValueError: no image, or half of a character (a lone surrogate) in a text.
    """

    images: tuple[ImageSource, ...]
    question: str
    answers: tuple[str, ...] = ()
    source: str = ""

    def __post_init__(self) -> None:
        # A string would pass as a sequence of one-letter strings.
        for name in ("images", "answers"):
            value = getattr(self, name)
            if not isinstance(value, tuple):
                raise TypeError(
                    f"{name} must be a tuple, got {type(value).__name__} {shown(value)}"
                )
        if not self.images:
            raise ValueError("images must hold at least one image")
        if any(hasattr(image, "read") for image in self.images):
            raise TypeError("images must not be open files, which can be read once; give the paths")
        for name, text in (("question", self.question), *(("answers", a) for a in self.answers)):
            if not isinstance(text, str):
                raise TypeError(f"{name} must be text, got {type(text).__name__} {shown(text)}")
            check_text(f"{self.source or 'row'}: {name}", text)

    def load(self, limits: ImageLimits) -> list[Image.Image]:
        """The images in RGB.

        Raises:
            ValueError: a image cannot be used; the message names the row.
        """
        return [self._load(image, limits) for image in self.images]

    def _load(self, image: ImageSource, limits: ImageLimits) -> Image.Image:
        try:
            return load_image(image, limits)
        except ImageError as error:
            raise ImageError(f"{self.source}: {error}" if self.source else str(error)) from error


def read_rows(path: str | os.PathLike[str], *, limit: int | None = None) -> list[Row]:
    """Questions from a JSONL file (or a JSON list); paths of images are relative to the file.

    Keys: `image` or `images` (a path or a list of them), `question`, and optionally `answer` or
    `answers` (a text or a list of accepted ones). Other keys and empty lines are ignored. Images
    must be there, but are not opened yet.

    Args:
        path: the file.
        limit: take the first rows only.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is wrong, or there is no row; the message names the line.
    """
    file = Path(path)
    if limit is not None:
        whole_number("limit", limit, 1)
    if not file.is_file():
        raise FileNotFoundError(f"data must be a JSONL file, but there is no file {file}")
    records = itertools.islice(parse_records(file.read_bytes(), str(file)), limit)
    rows = [_parse(record, file.parent, source) for source, record in records]
    if not rows:
        raise ValueError(f"{file} holds no question")
    return rows


def as_rows(rows: Iterable[Row | Mapping[str, Any]]) -> list[Row]:
    """Rows, made from mappings with the keys of the file where necessary.

    Raises:
        ValueError: a row is wrong, or there is none.
        TypeError: neither a `Row` nor a mapping.
    """
    made: list[Row] = []
    for number, row in enumerate(rows, 1):
        source = f"row {number}"
        if isinstance(row, Row):
            made.append(row if row.source else Row(row.images, row.question, row.answers, source))
        elif isinstance(row, Mapping):
            made.append(_row(row, Path(), source))
        else:
            raise TypeError(f"{source} must be a Row or a mapping, got {type(row).__name__}")
    if not made:
        raise ValueError("rows must hold at least one question")
    return made


def has_answers(rows: Sequence[Row]) -> bool:
    """Whether the user gave answers.

    Raises:
        ValueError: to some questions only.
    """
    without = [row for row in rows if not row.answers]
    if without and len(without) < len(rows):
        first = next(row for row in rows if row.answers)
        raise ValueError(
            f"{without[0].source} has no answer but {first.source} has; give all questions "
            "answers, or none to compare with the unreduced model's own"
        )
    return not without


def image_digests(
    rows: Sequence[Row], limits: ImageLimits, advance: Callable[[int], object]
) -> list[tuple[str, ...]]:
    """For every row the digests of its images' pixels; every image is opened once.

    Two files with the same pixels are one image, because a split by file name could put copies of
    one image into both parts.

    Raises:
        ValueError: a image cannot be used; the message names the row.
    """
    known: dict[str, str] = {}
    digests: list[tuple[str, ...]] = []
    for row in rows:
        found = []
        for image in row.images:
            name = os.fspath(image) if isinstance(image, (str, os.PathLike)) else ""
            digest = known.get(name) or _digest(row._load(image, limits))
            if name:
                known[name] = digest
            found.append(digest)
        digests.append(tuple(found))
        advance(1)
    return digests


def _digest(image: Image.Image) -> str:
    content = hashlib.sha256(f"{image.size}".encode())
    content.update(image.tobytes())
    return content.hexdigest()


def _parse(values: Any, folder: Path, source: str) -> Row:
    if not isinstance(values, dict):
        raise ValueError(f"{source} must be a JSON object, got {type(values).__name__}")
    return _row(values, folder, source)


def _row(values: Mapping[str, Any], folder: Path, source: str) -> Row:
    images = _listed(values, _IMAGES, source)
    if not images:
        raise ValueError(f"{source} has no 'image' (a path, or 'images' with a list of them)")
    question = values.get("question")
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"{source} needs a 'question' (a text), got {shown(question)}")
    check_text(f"{source}: 'question'", question)
    answers = _listed(values, _ANSWERS, source)
    for answer in answers:
        if not isinstance(answer, str) or not answer.strip():
            raise ValueError(
                f"{source}: 'answer' must be a text or a list of texts, got {shown(answer)}"
            )
        check_text(f"{source}: 'answer'", answer)
    return Row(
        tuple(_image_source(image, folder, source) for image in images),
        question.strip(),
        tuple(answers),
        source,
    )


def _listed(values: Mapping[str, Any], names: tuple[str, str], source: str) -> list[Any]:
    given = [name for name in names if values.get(name) is not None]
    if len(given) > 1:
        raise ValueError(f"{source} must have one of {names[0]!r} and {names[1]!r}, not both")
    if not given:
        return []
    value = values[given[0]]
    value = list(value) if isinstance(value, (list, tuple)) else [value]
    if not value:
        raise ValueError(f"{source}: {given[0]!r} is an empty list")
    return value


def _image_source(value: Any, folder: Path, source: str) -> ImageSource:
    try:
        return locate(value, folder)
    except ImageError as error:
        raise ImageError(f"{source}: {error}") from error
