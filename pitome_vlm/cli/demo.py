"""`pitome-vlm demo`: merging on the bundled tiny model, in the terminal and as a page, offline."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.text import Text

from . import options as o
from .session import check_output
from .terminal import progress_bars, quiet, show_table, write

if TYPE_CHECKING:
    from ..demo import Sample
    from ..measure.demo_benchmark import Outcome
    from .demo_run import Demo, Scene, Score

IMAGES = ("scene.png", "scene-compared.png")
PAGE = "report.html"
# The questions of one scene are folded to this width, so that its table fits 80 characters.
NARROW_QUESTION = 14
# Of the held-out questions, which are not read before the first line.
QUESTION_TYPES = 9


def demo(
    output: Annotated[
        Path,
        o.output_option("Folder for scene.png, scene-compared.png and report.html."),
    ] = Path("pitome-demo"),
    questions: Annotated[
        int, o.plain("Number of held-out questions to measure accuracy on.", "N")
    ] = 135,
    seed: Annotated[
        int | None,
        o.plain("Random seed for drawing another scene and other questions.", "N", min=0),
    ] = None,
    report: Annotated[
        bool, o.plain("Whether to write images and report.html.", None, "--report/--no-report")
    ] = True,
    overwrite: o.Overwrite = False,
    verbose: o.Verbose = False,
) -> None:
    """Show on the bundled tiny LLaVA what merging keeps, what it costs and what it saves.

    Compares the default with ToMe, PiToMe as published and random selection. Needs no network and
    is done in about a minute.
    """
    started = time.perf_counter()
    if report:
        check_output(output, (*IMAGES, PAGE), overwrite=overwrite)
    if questions < QUESTION_TYPES:
        raise ValueError(
            f"--questions must be in {QUESTION_TYPES}.., so that each of the {QUESTION_TYPES} "
            f"types is asked, got {questions}"
        )
    write("A tiny LLaVA answers the same questions with all visual tokens and with fewer.")
    with quiet(verbose):
        from .demo_run import balanced, chosen_scene, held_out, load_demo
        from .session import one_thread

        scene, asked = chosen_scene(seed), balanced(held_out(), questions, seed or 0)
        run = load_demo(verbose=verbose)
        with one_thread():
            answers = run.answers(scene)
            _show_scene(run, scene, answers)
            if report:
                from .demo_page import write_images, write_page

                _show_files(write_images([output / name for name in IMAGES], run, scene, answers))
            scores = _scores(run, asked)
            _show_scores(run, scores)
            if report:
                _show_files([write_page(output / PAGE, run, scene, answers, scores, seed)])
    write(f"{time.perf_counter() - started:.0f} s in total")


def _show_files(paths: Sequence[Path]) -> None:
    for path in paths:
        write(str(path))


def _show_scene(run: Demo, scene: Scene, outcomes: Sequence[Outcome]) -> None:
    from .demo_run import DEFAULT, SHOWN_KEEP, UNMERGED, setting, what_is_kept

    weights = sum(p.numel() for p in run.model.parameters())
    write(
        f"It has {weights / 1e6:.1f} M parameters. Scene {scene.number} of the split {scene.split} "
        "was not part of its training."
    )
    write("")
    columns = ["question", "answer"]
    for outcome in outcomes:
        kept = "" if outcome.setting == UNMERGED else f"\n{outcome.tokens} tokens"
        columns.append(outcome.setting.name.replace(" ", "\n") + kept)
    rows: list[list[str | Text]] = [
        [
            sample.question,
            sample.answer,
            *(_marked(outcome.answers[index], sample.answer) for outcome in outcomes),
        ]
        for index, sample in enumerate(scene.samples)
    ]
    show_table("One held-out scene", columns, rows, folds=(0, NARROW_QUESTION))
    write(f"{DEFAULT}: {what_is_kept(scene, run.groups(setting(DEFAULT, SHOWN_KEEP), scene))}")


def _marked(answer: str, right: str) -> Text:
    """The first word of an answer, with a mark that says whether the answer is right."""
    mark, colour = ("✓", "green") if answer == right else ("✗", "red")
    first, *more = answer.split() or ["-"]
    return Text.assemble((mark, colour), f" {first}{' …' if more else ''}")


def _scores(run: Demo, asked: Sequence[Sample]) -> list[Score]:
    from .demo_run import KEEPS, METHODS, TIMED_BATCHES, TIMED_RUNS, settings

    with progress_bars() as progress:
        answers = len(settings(METHODS, *KEEPS)) * len(asked)
        asking = progress.add_task("questions ", total=answers)
        timing = progress.add_task("timed runs", total=TIMED_RUNS * len(TIMED_BATCHES))
        return run.scores(
            asked,
            lambda count: progress.advance(asking, count),
            lambda count: progress.advance(timing, count),
        )


def _show_scores(run: Demo, scores: list[Score]) -> None:
    from .demo_run import new_budgets, note, score_columns, score_row

    show_table(
        f"{len(scores[0].outcome.answers)} held-out questions, the same number of every type",
        score_columns(run.model),
        [score_row(score, scores[0]) for score in scores],
        starts=new_budgets(scores),
    )
    write(note(scores))
