"""The files of a sweep: one JSON per finished cell, the questions of every task, failures, timing.

Knows: names, formats and how to write so that a killed process leaves whole files only. Does not
know: how anything is measured, or what a report makes of it.

    cells/<cell>.json      identity, result, answers and scores of a finished cell
    questions/<task>.json  what was asked, once per task; cells name it by its digest
    failed/<cell>.txt      traceback of a cell that failed last time
    timing.json            time to the first token of every setting, taken in turns
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...common import write_bytes, write_text
from .suites import Cell

FORMAT = 1
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


@dataclass(frozen=True)
class Question:
    """One question of a task.

    Attributes:
        doc_id: its number in the task.
        cluster: which picture it is about; the question itself where that is not known.
        group: its type or category, empty where the task has none.
        target: the right answer as text.
        doc_hash: lmms-eval's hash of the whole document.
    """

    doc_id: int
    cluster: str
    group: str
    target: str
    doc_hash: str


@dataclass
class Measured:
    """What one evaluation gave.

    Attributes:
        results: the task's own metrics, as lmms-eval names them.
        questions: what was asked.
        answers: one text per question.
        scores: one number per question, None where the task scores only the whole.
        seconds: wall time of answering, rank 0.
        facts: FLOPs, cache, token counts, hardware, versions.
        lmms_eval: everything else lmms-eval reported.
    """

    results: dict[str, float]
    questions: list[Question]
    answers: list[str]
    scores: list[float] | None
    seconds: float
    facts: dict[str, Any]
    lmms_eval: dict[str, Any]


@dataclass
class Record:
    """A finished cell as stored."""

    identity: dict[str, Any]
    measured: Measured

    @property
    def scores(self) -> np.ndarray | None:
        """[questions] scores."""
        return None if self.measured.scores is None else np.array(self.measured.scores)

    @property
    def clusters(self) -> list[str]:
        """The picture of every question."""
        return [question.cluster for question in self.measured.questions]


class Folder:
    """A sweep's folder."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        if self.root.exists() and not self.root.is_dir():
            raise ValueError(f"output must be a folder, but {self.root} is a file")

    def cell(self, cell: Cell) -> Path:
        """Where a finished cell lies."""
        return self.root / "cells" / f"{cell.file}.json"

    def failure(self, cell: Cell) -> Path:
        """Where a failed cell's traceback lies."""
        return self.root / "failed" / f"{cell.file}.txt"

    def questions(self, task: str) -> Path:
        """Where a task's questions lie."""
        return self.root / "questions" / f"{re.sub(r'[^A-Za-z0-9._=-]+', '_', task)}.json"

    @property
    def timing(self) -> Path:
        """Where the timing lies."""
        return self.root / "timing.json"

    def save(self, cell: Cell, record: Record) -> None:
        """Store a finished cell; atomic.

        Raises:
            ValueError: the task's questions are not those of the cells before.
        """
        measured = record.measured
        columns = {
            name: [getattr(question, name) for question in measured.questions]
            for name in Question.__dataclass_fields__
        }
        text = _dump(columns)
        path = self.questions(cell.task)
        if not path.exists():
            write_text(path, text)
        elif path.read_text(encoding="utf-8") != text:
            raise ValueError(
                f"{cell.name}: the questions differ from those in {path}; the task's data has "
                "changed since the other cells were measured"
            )
        rest = {k: v for k, v in asdict(measured).items() if k != "questions"}
        body = {"format": FORMAT, "questions_sha256": _digest(text), "identity": record.identity}
        write_text(self.cell(cell), _dump(body | rest))
        self.failure(cell).unlink(missing_ok=True)

    def load(self, cell: Cell) -> Record | None:
        """A finished cell, None where there is none.

        Raises:
            ValueError: the file is damaged or of another format.
        """
        path = self.cell(cell)
        if not path.is_file():
            return None
        stored = _read(path)
        if stored.get("format") != FORMAT:
            raise ValueError(f"{path}: format must be {FORMAT}, got {stored.get('format')!r}")
        questions = self.questions(cell.task)
        if not questions.is_file() or _digest(questions.read_text()) != stored["questions_sha256"]:
            raise ValueError(f"{path} does not belong to the questions in {questions}")
        columns = _read(questions)
        try:
            asked = [Question(*row) for row in zip(*columns.values(), strict=True)]
            values = {k: stored[k] for k in Measured.__dataclass_fields__ if k != "questions"}
            measured = Measured(questions=asked, **values)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error!r}") from error
        if len(measured.answers) != len(asked):
            raise ValueError(f"{path}: {len(measured.answers)} answers to {len(asked)} questions")
        return Record(stored["identity"], measured)

    def finished(self) -> int:
        """How many cells lie here."""
        return len(list((self.root / "cells").glob("*.json")))

    def save_timing(self, timing: dict[str, Any]) -> None:
        """Store the timing; atomic."""
        write_text(self.timing, _dump(timing))

    def load_timing(self) -> dict[str, Any] | None:
        """The stored timing, None where there is none."""
        return _read(self.timing) if self.timing.is_file() else None

    def save_failure(self, cell: Cell, text: str) -> None:
        """Store a failed cell's traceback."""
        write_text(self.failure(cell), text)

    def write(self, name: str, content: str | bytes) -> Path:
        """Store a file of the report; atomic."""
        path = self.root / name
        return write_text(path, content) if isinstance(content, str) else write_bytes(path, content)


def fingerprint(model: str) -> str:
    """A digest of a checkpoint folder's content; the name itself for one on the hub.

    Configuration files are read whole, of weights the size and both ends: enough to tell two
    trainings apart without reading gigabytes.
    """
    folder = Path(model)
    if not folder.is_dir():
        return model
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix in _PARTS):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_END))
            file.seek(max(0, size - _END))
            digest.update(file.read(_END))
    return f"sha256:{digest.hexdigest()}"


_PARTS = {".json", ".safetensors", ".bin", ".model", ".jinja"}
_END = 8 << 20


def _dump(value: Any) -> str:
    # A default representation holds a memory address, which says nothing and changes every run.
    text = json.dumps(value, default=lambda v: _ADDRESS.sub("", str(v)), ensure_ascii=False)
    return text + "\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to measure it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value
