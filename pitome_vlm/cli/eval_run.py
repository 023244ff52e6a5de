"""How `pitome-vlm eval` measures what is left of a sweep, says how far it is, and reports.

Decides which of several processes speaks, and keeps the libraries' output away. How a cell is
measured, stored and reported is left to `pitome_vlm.measure.evaluate` and `pitome_vlm.lmms`.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .session import DEMO, is_first_process, model_path
from .terminal import quiet, say, write

if TYPE_CHECKING:
    from ..measure.evaluate.records import Folder
    from ..measure.evaluate.suites import Cell
    from ..measure.evaluate.sweep import Event


@dataclass
class Sweep:
    """Cells to measure on one model, and what of them is still to be done.

    Attributes:
        model: folder or hub name.
        model_args: further arguments of the model class, as text.
        batch_size: questions at a time.
        gen_kwargs: generation options in place of the tasks' own.
        tasks: lmms-eval tasks.
        cells: all cells.
        limit: first questions of every task only, None for all.
        folder: where finished cells are kept.
        include_path: folder with further tasks.
        verbose: let the libraries talk.
        run: what is the same for all cells, as it is stored with them.
        todo: cells that are not finished; see `plan`.
        overwrite: whether the folder is emptied before the first cell is measured.
    """

    model: str
    model_args: dict[str, str]
    batch_size: int
    gen_kwargs: str | None
    tasks: tuple[str, ...]
    cells: list[Cell]
    limit: int | None
    folder: Folder
    include_path: Path | None
    verbose: bool
    run: dict[str, Any] = field(init=False)
    todo: list[Cell] = field(default_factory=list)
    overwrite: bool = False

    def plan(self, *, resume: bool, overwrite: bool) -> None:
        """Read the folder, and find out what is left; refuse cells of another run."""
        from ..measure.evaluate.sweep import pending, versions
        from ..measure.provenance import checkpoint_fingerprint

        self.run = {
            "model": DEMO if self.model == model_path(DEMO) else self.model,
            "checkpoint": checkpoint_fingerprint(self.model),
            "model_args": self.model_args,
            "batch_size": self.batch_size,
            "limit": self.limit,
            "gen_kwargs": self.gen_kwargs,
            "versions": versions(),
        }
        self.overwrite = overwrite
        if overwrite:
            self.todo = list(self.cells)
        else:
            self.todo = pending(self.cells, self.folder, self.run, resume=resume)

    @property
    def settings(self) -> list[Any]:
        """Every setting once."""
        return list(dict.fromkeys(cell.setting for cell in self.cells))

    def work(self, timing: bool) -> bool:
        """Whether the model is needed at all."""
        return bool(self.todo) or (timing and not self._timed())

    def measure(self, timing: bool) -> dict[Cell, str]:
        """Measure what is left; the error of every cell that failed."""
        if is_first_process():
            done = len(self.cells) - len(self.todo)
            say(f"{len(self.cells)} cells, {done} finished already; loading lmms-eval ...")
        with _calm(self.verbose):
            evaluator = self._evaluator()
            if evaluator.processes > 1:
                # All must have read the folder before the first one writes to it.
                evaluator.wait()
            if self.overwrite and is_first_process():
                self.folder.clear()
            from ..measure.evaluate.sweep import run_sweep

            failures = run_sweep(
                self.cells,
                self.todo,
                evaluator,
                self.folder,
                self.run,
                tell=_tell,
                stop_at_failure=evaluator.processes > 1,
            )
            if timing and is_first_process() and not self._timed():
                self._time(evaluator, failures)
        return failures

    def _evaluator(self) -> Any:
        from ..lmms.evaluation import Evaluator

        include = self.include_path
        evaluator = Evaluator(
            self.model,
            self.folder.root,
            model_args=self.model_args,
            batch_size=self.batch_size,
            limit=self.limit,
            gen_kwargs=self.gen_kwargs,
            include_path=None if include is None else str(include),
        )
        evaluator.check_tasks(self.tasks)
        evaluator.load(self.settings)
        return evaluator

    def _timed(self) -> bool:
        stored = self.folder.load_timing() or {"settings": {}}
        wanted = self._identities(self.settings)
        return all(stored["settings"].get(name) == value for name, value in wanted.items())

    def _identities(self, settings: list[Any]) -> dict[str, Any]:
        from ..measure.evaluate.suites import Cell
        from ..measure.evaluate.sweep import identity

        task = self.tasks[0]
        return {s.name: identity(Cell(task, s), self.run) for s in settings}

    def _time(self, evaluator: Any, failures: dict[Cell, str]) -> None:
        """Time the settings that work; those of failed cells may fail again."""
        broken = {cell.setting for cell in failures}
        settings = [setting for setting in self.settings if setting not in broken]
        if not settings:
            return
        say(f"timing the first token of {len(settings)} settings ...")
        timing = evaluator.time_first_tokens(self.tasks[0], settings)
        self.folder.save_timing({"settings": self._identities(settings), **timing})


def report(sweep: Sweep, failures: dict[Cell, str], *, plots: bool, published: bool) -> None:
    """Write the report of what is finished and say where it is."""
    with quiet():
        from ..measure.evaluate.report_pages import write_report

        files = write_report(
            sweep.cells,
            sweep.folder,
            sweep.run,
            failures,
            plots=plots,
            published=published,
        )
    for path in files:
        write(str(path))


def _tell(event: Event) -> None:
    if not is_first_process() or event.kind == "start":
        return
    place = f"[{event.index}/{event.total}] {event.cell.name}"
    if event.kind == "failed":
        say(f"{place}: FAILED: {event.error}")
        return
    scores = event.measured.scores if event.measured else None
    right = f"{100 * sum(scores) / len(scores):.1f} % right, " if scores else ""
    left = f"; about {_duration(event.left)} left" if event.left else ""
    say(f"{place}: {right}{_duration(event.seconds)}{left}")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@contextlib.contextmanager
def _calm(verbose: bool) -> Iterator[None]:
    """Keep lmms-eval's log and prints away, and its progress bars where there is no terminal."""
    if verbose:
        yield
        return
    from loguru import logger

    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet())
        if not sys.stderr.isatty():
            stack.enter_context(_without_bars())
        sink = stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(contextlib.redirect_stdout(sink))
        logger.disable("lmms_eval")
        stack.callback(logger.enable, "lmms_eval")
        yield


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Let tqdm draw nothing, for bars of any library that does not ask for one in particular."""
    from tqdm import std

    original = std.tqdm.__init__

    def disabled(bar: Any, *args: Any, **options: Any) -> None:
        original(bar, *args, **options | {"disable": True})

    std.tqdm.__init__ = disabled
    try:
        yield
    finally:
        std.tqdm.__init__ = original
