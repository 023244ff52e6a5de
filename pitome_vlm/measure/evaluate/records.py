"""The files of a sweep: one JSON per finished cell, the questions of every task, failures, timing.

A killed process leaves whole files only.

    cells/<cell>.json      identity, result, answers and scores of a finished cell
    questions/<task>.json  what was asked, once per task; cells name it by its digest
    failed/<cell>.txt      traceback of a cell that failed last time
    timing.json            time to the first token of every setting, taken in turns
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...common import read_json, write_bytes, write_text
from ..store import REMEASURE, Store, as_json, digest, file_name
from .suites import Cell


@dataclass(frozen=True)
class Question:
    """One question of a task.

    Attributes:
        doc_id: its number in the task.
        cluster: which image it is about; the question itself where that is not known.
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
        seconds: wall time of answering, of the first process.
        facts: FLOPs, cache, token counts, hardware and versions.
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
        """[questions] the image of every question."""
        return [question.cluster for question in self.measured.questions]


class Folder:
    """A sweep's folder."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        """Name a folder, which need not exist.

        Raises:
            ValueError: the root is a file.
        """
        self.root = Path(root)
        self.store = Store(root)

    def failure(self, cell: Cell) -> Path:
        """The traceback of a cell that failed."""
        return self.root / "failed" / f"{cell.file}.txt"

    def questions(self, task: str) -> Path:
        """The questions of a task."""
        return self.root / "questions" / f"{file_name(task)}.json"

    @property
    def timing(self) -> Path:
        """The times to the first token."""
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
        text = as_json(columns)
        path = self.questions(cell.task)
        if not path.exists():
            write_text(path, text)
        elif path.read_text(encoding="utf-8") != text:
            raise ValueError(
                f"{cell.name}: the questions differ from those in {path}; the task's data has "
                "changed since the other cells were measured"
            )
        body = {"questions_sha256": digest(text), **asdict(measured)}
        del body["questions"]
        self.store.put(cell.file, body, record.identity)
        self.failure(cell).unlink(missing_ok=True)

    def load(self, cell: Cell, identity: Mapping[str, Any] | None = None) -> Record | None:
        """A finished cell, None where there is none.

        Raises:
            ValueError: the file is damaged, or was measured with another identity than this.
        """
        stored = self.store.get(cell.file, identity)
        if stored is None:
            return None
        path, questions = self.store.path(cell.file), self.questions(cell.task)
        if (
            not questions.is_file()
            or digest(questions.read_text("utf-8")) != stored["questions_sha256"]
        ):
            raise ValueError(f"{path} does not belong to the questions in {questions}")
        columns = read_json(questions, hint=REMEASURE)
        try:
            asked = [Question(*row) for row in zip(*columns.values(), strict=True)]
            values = {k: stored[k] for k in Measured.__dataclass_fields__ if k != "questions"}
            measured = Measured(questions=asked, **values)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error!r}") from error
        if len(measured.answers) != len(asked):
            raise ValueError(f"{path}: {len(measured.answers)} answers to {len(asked)} questions")
        return Record(self.store.identity_of(cell.file), measured)

    def clear(self) -> None:
        """Delete what was measured: cells, questions, failures and timing."""
        self.store.clear()
        found = [*self.root.glob("questions/*.json"), *self.root.glob("failed/*.txt"), self.timing]
        for path in found:
            path.unlink(missing_ok=True)

    def save_timing(self, timing: dict[str, Any]) -> None:
        """Store the timing; atomic."""
        write_text(self.timing, as_json(timing))

    def load_timing(self) -> dict[str, Any] | None:
        """The stored timing, None where there is none."""
        return read_json(self.timing, hint=REMEASURE) if self.timing.is_file() else None

    def save_failure(self, cell: Cell, text: str) -> None:
        """Store a failed cell's traceback."""
        write_text(self.failure(cell), text)

    def write(self, name: str, content: str | bytes) -> Path:
        """Store a file of the report; atomic."""
        data = content.encode() if isinstance(content, str) else content
        return write_bytes(self.root / name, data)
