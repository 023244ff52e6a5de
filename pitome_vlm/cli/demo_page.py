"""The images and the page of `pitome-vlm demo`; the README's image is one of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ..common import write_bytes, write_text
from ..demo import scene_image
from ..measure.demo_benchmark import Outcome
from ..measure.provenance import in_words, provenance
from ..measure.tables import Cell, Figure, Table, html_report, png
from ..measure.visualize import SourceMap, overlay, strip
from .demo_run import (
    DEFAULT,
    KEEPS,
    SHOWN_KEEP,
    UNMERGED,
    Demo,
    Scene,
    Score,
    new_budgets,
    note,
    score_columns,
    score_row,
    setting,
)

# A multiple of the 120 pixels that the model sees, large enough to look at.
IMAGE_SIZE = 480


def write_images(
    paths: Sequence[Path], run: Demo, scene: Scene, outcomes: Sequence[Outcome]
) -> list[Path]:
    """Write the scene, and next to it what the default makes of it with both answers.

    `paths` names the two files; `outcomes` are those of `Demo.answers`.
    """
    image = scene_image(scene.number, scene.split, IMAGE_SIZE)
    default = next(one for one in outcomes if one.setting.name == DEFAULT)
    panels = [
        (_caption(scene, outcomes[0]), image),
        (_caption(scene, default), _drawn(image, run.groups(default.setting, scene))),
    ]
    files = zip(paths, (image, strip(panels, height=IMAGE_SIZE)), strict=True)
    return [write_bytes(path, png(content)) for path, content in files]


def write_page(
    path: Path,
    run: Demo,
    scene: Scene,
    outcomes: Sequence[Outcome],
    scores: Sequence[Score],
    seed: int | None,
) -> Path:
    """Write the report: every method on the scene, its answers, and the scores."""
    page = html_report(
        "Fewer visual tokens, same questions",
        lead=(
            "A tiny LLaVA answers questions about a scene it has not seen before. Each image shows "
            "which patches became one visual token: same colour and outline, same token. Outlined "
            "in white: kept as it is."
        ),
        figures=_figures(run, scene, outcomes),
        tables=[_answer_table(scene, outcomes), _score_table(run, scores)],
        footer=f"Measured by pitome-vlm demo: {in_words(provenance(run.model, seed=seed or 0))}.",
    )
    return write_text(path, page)


def _drawn(image: Image.Image, groups: SourceMap) -> Image.Image:
    return overlay(image, groups, size=IMAGE_SIZE)


def _caption(scene: Scene, outcome: Outcome) -> str:
    asked = scene.samples[scene.question].question
    answer = outcome.answers[scene.question]
    name = "" if outcome.setting == UNMERGED else f"{outcome.setting.name}, "
    return f"{asked}\n{name}{outcome.tokens} tokens: {answer}"


def _kept(keep: float) -> str:
    return f"{keep:.0%} of the tokens"


def _figures(run: Demo, scene: Scene, outcomes: Sequence[Outcome]) -> list[Figure]:
    image = scene_image(scene.number, scene.split, IMAGE_SIZE)
    figures = [Figure(image, _caption(scene, outcomes[0]))]
    for outcome in outcomes[1:]:
        drawn = _drawn(image, run.groups(outcome.setting, scene))
        figures.append(Figure(drawn, _caption(scene, outcome), _kept(SHOWN_KEEP)))
    groups = run.groups(setting(DEFAULT, min(KEEPS)), scene)
    caption = f"{DEFAULT}, {groups.tokens} tokens"
    figures.append(Figure(_drawn(image, groups), caption, _kept(min(KEEPS))))
    return figures


def _answer_table(scene: Scene, outcomes: Sequence[Outcome]) -> Table:
    rows: list[list[str | Cell]] = []
    for index, sample in enumerate(scene.samples):
        given = [Cell(o.answers[index], bool(o.correct[index])) for o in outcomes]
        rows.append([sample.question, sample.answer, *given])
    return Table(
        f"Questions about this scene, {_kept(SHOWN_KEEP)}",
        ["question", "right answer", *(outcome.setting.name for outcome in outcomes)],
        rows,
    )


def _score_table(run: Demo, scores: Sequence[Score]) -> Table:
    columns = score_columns(run.model)
    return Table(
        f"{len(scores[0].outcome.answers)} held-out questions, the same number of every type",
        columns,
        [score_row(score, scores[0]) for score in scores],
        note=note(scores),
        numbers=frozenset(range(1, len(columns))),
        starts=new_budgets(scores),
    )
