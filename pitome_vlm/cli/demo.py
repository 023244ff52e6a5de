"""`pitome-vlm demo`: the whole story on the bundled tiny model, offline.

Knows: the order of the story and how it looks in a terminal. Does not know: how anything is
measured (`demo_run.py`) or written to files (`demo_files.py`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from . import options as o
from .terminal import err, out, quiet, write

if TYPE_CHECKING:
    from ..demo import Sample
    from ..measure.demo_benchmark import Outcome
    from .demo_run import Demo, Score

WIDE = 110
FULL_TABLE = "eval/results/demo"


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for pictures and report.")
    ] = Path("pitome-demo"),
    questions: Annotated[
        int, typer.Option(metavar="N", help="Held-out questions to measure accuracy on.")
    ] = 135,
    seed: Annotated[int, typer.Option(min=0, help="Chooses the scene and the questions.")] = 0,
    picture: Annotated[
        bool, typer.Option("--picture/--no-picture", help="Write pictures and report.html.")
    ] = True,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
) -> None:
    """Compare PiToMe with ToMe, random selection and pooling on the bundled tiny LLaVA.

    Needs no network and takes less than a minute.
    """
    del debug  # read by the command group
    started = time.perf_counter()
    if picture and output.exists() and not output.is_dir():
        raise ValueError(f"output must be a folder, but {output} is a file")
    from .demo_run import balanced, choose_scene, held_out, load_demo, one_thread

    samples = held_out()
    scene, asked = choose_scene(samples, seed), balanced(samples, questions, seed)
    run = load_demo(verbose=verbose)
    with quiet(verbose), one_thread():
        answers = run.answers(scene)
        _show_scene(run, scene, answers)
        scores = _scores(run, asked)
        _show_scores(scores)
        if picture:
            from .demo_files import write_files

            for path in write_files(output, run, scene, answers, scores, seed):
                write(f"wrote {path}")
    write(f"{time.perf_counter() - started:.0f} s in all")


def _show_scene(run: Demo, scene: Sequence[Sample], outcomes: Sequence[Outcome]) -> None:
    from .demo_run import SHOWN_KEEP, SPLIT, UNMERGED

    weights = sum(p.numel() for p in run.model.parameters())
    write(
        f"The bundled LLaVA has {weights / 1e6:.1f} M parameters. Scene {scene[0].scene_id} "
        f"({SPLIT} split) was never seen in training."
    )
    # Seven columns in 80 characters: no padding, and long answers break at their hyphen.
    narrow = out.width < WIDE
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0 if narrow else 1), pad_edge=False)
    table.title, table.title_justify = "One held-out scene", "left"
    table.add_column("question", min_width=14)
    table.add_column("right")
    for outcome in outcomes:
        kept = "" if outcome.setting == UNMERGED else f"\n{SHOWN_KEEP:.0%}"
        table.add_column(outcome.setting.name + kept, overflow="fold")
    for index, sample in enumerate(scene):
        given = [_marked(outcome.answers[index], sample.answer) for outcome in outcomes]
        cells = [sample.answer, *given]
        table.add_row(sample.question, *(c.replace("-", "-\n") if narrow else c for c in cells))
    out.print(table)


def _marked(answer: str, right: str) -> str:
    from rich.markup import escape

    mark, colour = ("✓", "green") if answer == right else ("✗", "red")
    first, *more = answer.split() or ["-"]
    return f"[{colour}]{mark}[/] {escape(first)}{' …' if more else ''}"


def _scores(run: Demo, asked: Sequence[Sample]) -> list[Score]:
    from .demo_run import KEEPS, TIMED_RUNS, settings

    columns = TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), console=err, transient=True) as progress:
        asking = progress.add_task("questions", total=len(settings(*KEEPS)) * len(asked))
        timing = progress.add_task("timed runs", total=TIMED_RUNS)
        return run.scores(
            asked,
            lambda count: progress.advance(asking, count),
            lambda count: progress.advance(timing, count),
        )


def _show_scores(scores: list[Score]) -> None:
    first = scores[0]
    table = Table(box=box.SIMPLE_HEAD, title_justify="left")
    table.title = f"{len(first.outcome.answers)} held-out questions, every type equally often"
    table.add_column("method")
    for name in ("tokens", "right", "95 %", "prefill", "ratio", "KV cache"):
        table.add_column(name, justify="right")
    tokens = first.outcome.tokens
    for score in scores:
        if score.outcome.tokens != tokens:
            table.add_section()
            tokens = score.outcome.tokens
        table.add_row(*score_row(score, first))
    out.print(table)
    write(note(scores))


def score_row(score: Score, first: Score) -> list[str]:
    """A row of the comparison as text; `first` is the unmerged model."""
    low, high = score.interval
    return [
        score.outcome.setting.name,
        str(score.outcome.tokens),
        f"{score.outcome.accuracy:.1f} %",
        f"{low:.0f} to {high:.0f}",
        f"{score.prefill_ms:.1f} ms",
        f"{score.prefill_ms / first.prefill_ms:.2f}x",
        f"{score.kv_bytes / 1024:.0f} KiB",
    ]


def note(scores: list[Score]) -> str:
    """What a reader has to know about the numbers."""
    from .demo_run import TIMED_BATCH, TIMED_RUNS

    widest = max((score.interval for score in scores), key=lambda i: i[1] - i[0])
    return (
        f"A small sample: the truth may lie {(widest[1] - widest[0]) / 2:.0f} points to either "
        f"side, so neighbouring rows may swap. All held-out questions: {FULL_TABLE} in the "
        f"repository.\nPrefill: from pixels to the first token of {TIMED_BATCH} prompts at once, "
        f"median of {TIMED_RUNS} runs, methods taking turns; ratio to no merging. KV cache: per "
        "image."
    )
