"""How `pitome-vlm eval` carries a sweep through: load, measure, time, say, write down.

Knows: the order, who speaks when several processes work together, and which noise is kept away.
Does not know: options, how a cell is measured or stored, or how a report is made
(`pitome_vlm.lmms`).
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .terminal import quiet, say, write

if TYPE_CHECKING:
    from ..measure.evaluate.records import Folder
    from ..measure.evaluate.suites import Cell
    from ..measure.evaluate.sweep import Event


@dataclass(frozen=True)
class Plan:
    """A checked request."""

    model: str
    model_args: dict[str, str]
    batch_size: int
    gen_kwargs: str | None
    tasks: tuple[str, ...]
    cells: list[Cell]

    @property
    def settings(self) -> list[Any]:
        """Every setting once."""
        return list(dict.fromkeys(cell.setting for cell in self.cells))


def circumstances(plan: Plan, limit: int | None) -> dict[str, Any]:
    """What is the same for all cells, as it is stored with them."""
    from ..measure.evaluate.records import fingerprint
    from ..measure.evaluate.sweep import versions
    from .session import model_path

    bundled = plan.model == model_path("demo")
    return {
        "model": "demo" if bundled else plan.model,
        "checkpoint": fingerprint(plan.model),
        "model_args": plan.model_args,
        "batch_size": plan.batch_size,
        "limit": limit,
        "gen_kwargs": plan.gen_kwargs,
        "versions": versions(),
    }


@dataclass
class Sweep:
    """What is left to do, and the doing."""

    plan: Plan
    folder: Folder
    run: dict[str, Any]
    todo: list[Cell]
    include_path: Path | None
    verbose: bool

    def work(self, timing: bool) -> bool:
        """Whether the model is needed at all."""
        return bool(self.todo) or (timing and not self._timed())

    def measure(self, timing: bool) -> dict[Cell, str]:
        """Measure what is left; the error of every cell that failed."""
        plan = self.plan
        done = len(plan.cells) - len(self.todo)
        if is_first():
            say(f"{len(plan.cells)} cells, {done} finished already; loading lmms-eval ...")
        with _calm(self.verbose):
            evaluator = self._evaluator()
            if evaluator.processes > 1:
                # All have read the folder before the first one writes to it.
                evaluator.wait()
            from ..measure.evaluate.sweep import run_sweep

            failures = run_sweep(
                plan.cells,
                self.todo,
                evaluator,
                self.folder,
                self.run,
                tell=_tell,
                stop_at_failure=evaluator.processes > 1,
            )
            if timing and is_first() and not self._timed():
                self._time(evaluator, failures)
        return failures

    def _evaluator(self) -> Any:
        from ..lmms.evaluation import Evaluator, Options

        plan, include = self.plan, self.include_path
        evaluator = Evaluator(
            Options(
                plan.model,
                plan.model_args,
                plan.batch_size,
                self.run["limit"],
                plan.gen_kwargs,
                None if include is None else str(include),
                self.folder.root,
            )
        )
        evaluator.check_tasks(plan.tasks)
        evaluator.load(plan.settings)
        return evaluator

    def _timed(self) -> bool:
        stored = self.folder.load_timing() or {"settings": {}}
        wanted = self._identities(self.plan.settings)
        return all(stored["settings"].get(name) == value for name, value in wanted.items())

    def _identities(self, settings: list[Any]) -> dict[str, Any]:
        from ..measure.evaluate.suites import Cell
        from ..measure.evaluate.sweep import identity

        task = self.plan.tasks[0]
        return {s.name: identity(Cell(task, s), self.run) for s in settings}

    def _time(self, evaluator: Any, failures: dict[Cell, str]) -> None:
        """Time the settings that work; those of failed cells may fail again."""
        broken = {cell.setting for cell in failures}
        settings = [setting for setting in self.plan.settings if setting not in broken]
        if not settings:
            return
        say(f"timing the first token of {len(settings)} settings ...")
        timing = evaluator.time_first_tokens(self.plan.tasks[0], settings)
        self.folder.save_timing({"settings": self._identities(settings), **timing})


def report(sweep: Sweep, failures: dict[Cell, str], *, plots: bool, published: bool) -> None:
    """Write the report of what is finished and say where it is."""
    with quiet():
        from ..measure.evaluate.report_pages import write_report

        files = write_report(
            sweep.plan.cells,
            sweep.folder,
            sweep.run,
            failures,
            plots=plots,
            published=published,
        )
    for path in files:
        write(str(path))


def _tell(event: Event) -> None:
    if not is_first() or event.kind == "start":
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


def is_first() -> bool:
    """Whether this is the process that speaks and writes; torchrun and accelerate set RANK."""
    return os.environ.get("RANK", "0") == "0"


class _WithoutBars(io.TextIOBase):
    """stderr for a log file: progress bars, which rewrite their line, are left out."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.after_bar = False

    def write(self, text: str) -> int:
        bar = text.startswith("\r") or (self.after_bar and text == "\n")
        self.after_bar = text.startswith("\r")
        if not bar:
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        self.stream.flush()


@contextlib.contextmanager
def _calm(verbose: bool) -> Iterator[None]:
    """Keep lmms-eval's log, prints and (without a terminal) progress bars away."""
    if verbose:
        yield
        return
    from loguru import logger

    bars = sys.stderr if sys.stderr.isatty() else _WithoutBars(sys.stderr)
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet())
        sink = stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(contextlib.redirect_stdout(sink))
        stack.enter_context(contextlib.redirect_stderr(bars))
        logger.disable("lmms_eval")
        stack.callback(logger.enable, "lmms_eval")
        yield
