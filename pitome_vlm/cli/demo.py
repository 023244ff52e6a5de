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
    from ..measure.visualize import Figure, Table
    from .demo_run import Demo, Score

IMAGE_SIZE = 480
FILES = ("scene.png", "overlay.png", "report.html")
# The table of one scene has seven columns; on 80 characters its questions are folded to this width.
NARROW_QUESTION = 14


def demo(
    output: Annotated[
        Path,
        o.output_option("Folder for scene.png, overlay.png and report.html."),
    ] = Path("pitome-demo"),
    questions: Annotated[
        int, o.plain("Number of held-out questions to measure accuracy on.", "N")
    ] = 135,
    seed: Annotated[int, o.plain("Random seed for choosing scene and questions.", "N", min=0)] = 0,
    report: Annotated[
        bool, o.plain("Whether to write images and report.html.", None, "--report/--no-report")
    ] = True,
    overwrite: o.Overwrite = False,
    verbose: o.Verbose = False,
) -> None:
    """Compare PiToMe with ToMe, random selection and pooling on the bundled tiny LLaVA.

    Needs no network and is done in about a minute.
    """
    started = time.perf_counter()
    if report:
        check_output(output, FILES, overwrite=overwrite)
    with quiet(verbose):
        from .demo_run import balanced, choose_scene, held_out, load_demo
        from .session import one_thread

        samples = held_out()
        scene, asked = choose_scene(samples, seed), balanced(samples, questions, seed)
        run = load_demo(verbose=verbose)
        with one_thread():
            answers = run.answers(scene)
            _show_scene(run, scene, answers)
            scores = _scores(run, asked)
            _show_scores(run, scores)
            if report:
                for path in _write_files(output, run, scene, answers, scores, seed):
                    write(str(path))
    write(f"{time.perf_counter() - started:.0f} s in total")


def _show_scene(run: Demo, scene: Sequence[Sample], outcomes: Sequence[Outcome]) -> None:
    from .demo_run import SHOWN_KEEP, SPLIT, UNMERGED

    weights = sum(p.numel() for p in run.model.parameters())
    write(
        f"The bundled LLaVA has {weights / 1e6:.1f} M parameters. Scene {scene[0].scene_id} "
        f"({SPLIT} split) was not part of its training."
    )
    write("")
    columns = ["question", "answer"]
    for outcome in outcomes:
        kept = "" if outcome.setting == UNMERGED else f"\n{SHOWN_KEEP:.0%}"
        columns.append(outcome.setting.name.replace(" ", "\n") + kept)
    rows: list[list[str | Text]] = [
        [
            sample.question,
            sample.answer,
            *(_marked(outcome.answers[index], sample.answer) for outcome in outcomes),
        ]
        for index, sample in enumerate(scene)
    ]
    show_table("One held-out scene", columns, rows, folds=(0, NARROW_QUESTION))


def _marked(answer: str, right: str) -> Text:
    """The first word of an answer, with a mark that says whether the answer is right."""
    mark, colour = ("✓", "green") if answer == right else ("✗", "red")
    first, *more = answer.split() or ["-"]
    return Text.assemble((mark, colour), f" {first}{' …' if more else ''}")


def _scores(run: Demo, asked: Sequence[Sample]) -> list[Score]:
    from .demo_run import KEEPS, TIMED_RUNS, settings

    with progress_bars() as progress:
        asking = progress.add_task("questions ", total=len(settings(*KEEPS)) * len(asked))
        timing = progress.add_task("timed runs", total=TIMED_RUNS)
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


def _write_files(
    folder: Path,
    run: Demo,
    scene: Sequence[Sample],
    answers: Sequence[Outcome],
    scores: Sequence[Score],
    seed: int,
) -> list[Path]:
    """Write scene.png, overlay.png and report.html, and return their paths."""
    from ..common import write_bytes, write_text
    from ..measure.tables import png
    from ..measure.visualize import html_report, strip
    from .demo_run import SHOWN_KEEP

    figures = _figures(run, scene[0].scene_id)
    # The strip shows the compared methods at one budget; the page has the others as well.
    shown = [f for f in figures if f.note in ("", _kept(SHOWN_KEEP))]
    paths = [folder / name for name in FILES]
    write_bytes(paths[0], png(figures[0].image))
    write_bytes(paths[1], png(strip([(figure.caption, figure.image) for figure in shown])))
    page = html_report(
        "Fewer visual tokens, same questions",
        lead=(
            "A tiny LLaVA answers questions about a scene it has not seen before. Each image shows "
            "which patches became one visual token: same colour and outline, same token. Outlined "
            "in white: kept as it is. Grey: dropped."
        ),
        figures=figures,
        tables=[_answer_table(scene, answers), _score_table(run, scores)],
        footer=_footer(run, seed),
    )
    write_text(paths[2], page)
    return paths


def _kept(keep: float) -> str:
    return f"{keep:.0%} of the tokens"


def _figures(run: Demo, scene_id: int) -> list[Figure]:
    from ..demo import scene_image
    from ..measure.visualize import Figure, overlay
    from .demo_run import KEEPS, SHOWN_KEEP, SPLIT, settings

    image = scene_image(scene_id, SPLIT, IMAGE_SIZE)
    figures = [Figure(image, "The image")]
    # The model looks at the scene at its own size; the large image is drawn for the reader.
    model_input = scene_image(scene_id, SPLIT)
    for setting in [*settings(SHOWN_KEEP)[1:], settings(min(KEEPS))[1]]:
        groups = run.groups(setting, model_input)
        drawn = overlay(image, groups, size=IMAGE_SIZE)
        caption = f"{setting.name}, {groups.tokens} tokens"
        figures.append(Figure(drawn, caption, _kept(setting.config.budget.keep or 1.0)))
    return figures


def _answer_table(scene: Sequence[Sample], outcomes: Sequence[Outcome]) -> Table:
    from ..measure.visualize import Cell, Table
    from .demo_run import SHOWN_KEEP

    rows: list[list[str | Cell]] = []
    for index, sample in enumerate(scene):
        given = [Cell(o.answers[index], bool(o.correct[index])) for o in outcomes]
        rows.append([sample.question, sample.answer, *given])
    return Table(
        f"Questions about this scene, {_kept(SHOWN_KEEP)}",
        ["question", "right answer", *(outcome.setting.name for outcome in outcomes)],
        rows,
    )


def _score_table(run: Demo, scores: Sequence[Score]) -> Table:
    from ..measure.visualize import Table
    from .demo_run import new_budgets, note, score_columns, score_row

    return Table(
        f"{len(scores[0].outcome.answers)} held-out questions, the same number of every type",
        score_columns(run.model),
        [score_row(score, scores[0]) for score in scores],
        note=note(scores),
        numbers=frozenset(range(1, 7)),
        starts=new_budgets(scores),
    )


def _footer(run: Demo, seed: int) -> str:
    from ..measure.provenance import in_words, provenance

    return f"Measured by pitome-vlm demo: {in_words(provenance(run.model, seed=seed))}."
