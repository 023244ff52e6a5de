"""Run the cells of a sweep one after the other, keep what is finished, continue after a failure.

Decides which cells are wanted, which are there already and whether those are the same
measurement. Measuring itself is handed in, by `pitome_vlm.lmms.evaluation`.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .. import provenance
from ..store import plain
from .records import Folder, Measured, Record
from .suites import Cell

Kind = Literal["start", "done", "failed"]


@dataclass(frozen=True)
class Event:
    """Something that a waiting person wants to know.

    Attributes:
        kind: what happened to the cell.
        cell: which one.
        index: its number, from 1.
        total: cells in all.
        seconds: how long it took, loading and scoring included.
        left: seconds the rest will take, by what the cells so far took.
        measured: what came out, with kind "done".
        error: what went wrong, with kind "failed".
    """

    kind: Kind
    cell: Cell
    index: int
    total: int
    seconds: float = 0.0
    left: float = 0.0
    measured: Measured | None = None
    error: str = ""


def identity(cell: Cell, run: dict[str, Any]) -> dict[str, Any]:
    """Everything that decides what a cell measures; equal identities are one measurement.

    `run` is the same for the whole sweep: checkpoint, limit, batch size, versions, ...
    """
    merging = cell.setting.config.to_dict()
    # The package's version is in `run` already, under the name people look for.
    merging.pop("pitome_vlm_version")
    return plain({"task": cell.task, "method": cell.setting.method, "merging": merging, **run})


def versions() -> dict[str, str]:
    """Versions of the packages that decide a result."""
    found = provenance.versions("lmms-eval")
    return {name: number for name, number in found.items() if name != "python"}


def pending(
    cells: Sequence[Cell],
    folder: Folder,
    run: dict[str, Any],
    *,
    resume: bool,
) -> list[Cell]:
    """The cells that have still to be measured.

    Raises:
        FileExistsError: there are cells, and `resume` is off.
        ValueError: a finished cell was measured with other options or versions (`identity`).
    """
    folder.store.check(resume=resume)
    return [cell for cell in cells if folder.load(cell, identity(cell, run)) is None]


def run_sweep(
    cells: Sequence[Cell],
    left: Sequence[Cell],
    evaluate: Callable[[Cell], Measured | None],
    folder: Folder,
    run: dict[str, Any],
    *,
    tell: Callable[[Event], object] | None = None,
    stop_at_failure: bool = False,
) -> dict[Cell, str]:
    """Measure the cells that are left; every finished one is on disk before the next begins.

    Args:
        cells: all cells, for counting.
        left: those to measure, see `pending`.
        evaluate: measures one; None on a process that has nothing to store.
        folder: where to store.
        run: see `identity`.
        tell: called with every event.
        stop_at_failure: raise instead of continuing; processes that work together need it, since
            one of them alone cannot leave a cell.

    Returns:
        The error of every cell that failed.
    """
    failures: dict[Cell, str] = {}
    numbers = {cell: index for index, cell in enumerate(cells, 1)}
    begin = time.perf_counter()
    for done, cell in enumerate(left):
        start = time.perf_counter()
        if tell:
            tell(Event("start", cell, numbers[cell], len(cells)))
        measured, error = _attempt(cell, evaluate, folder, run, stop_at_failure)
        now = time.perf_counter()
        rest = (now - begin) / (done + 1) * (len(left) - done - 1)
        kind: Kind = "failed" if error else "done"
        if error:
            failures[cell] = error
        if tell and (error or measured):
            took = now - start
            tell(Event(kind, cell, numbers[cell], len(cells), took, rest, measured, error))
    return failures


def _attempt(
    cell: Cell,
    evaluate: Callable[[Cell], Measured | None],
    folder: Folder,
    run: dict[str, Any],
    stop_at_failure: bool,
) -> tuple[Measured | None, str]:
    """Measure and store one cell; what came out, or the error as one line."""
    try:
        measured = evaluate(cell)
        if measured is not None:
            folder.save(cell, Record(identity(cell, run), measured))
    except Exception as error:
        folder.save_failure(cell, traceback.format_exc())
        if stop_at_failure:
            raise
        return None, " ".join(f"{type(error).__name__}: {error}".split())
    return measured, ""
