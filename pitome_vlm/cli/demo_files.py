"""The files that `pitome-vlm demo` leaves: the scene, the overlays and a report.

Knows: what goes on the page. Does not know: how it was measured or how a page is made.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from ..common import __version__
from ..demo import Sample, scene_image
from ..measure.demo_benchmark import Outcome
from ..measure.visualize import Cell, Figure, Table, html_report, overlay, strip
from .demo import note, score_row
from .demo_run import KEEPS, SHOWN_KEEP, SPLIT, Demo, Score, settings

PICTURE_SIZE = 480


def write_files(
    folder: Path,
    run: Demo,
    scene: Sequence[Sample],
    answers: Sequence[Outcome],
    scores: Sequence[Score],
    seed: int,
) -> list[Path]:
    """Write scene.png, overlay.png and report.html; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = _figures(run, scene[0].scene_id)
    # The strip shows the compared methods at one budget; the page has the others as well.
    shown = [f for f in figures if f.note in ("", _kept(SHOWN_KEEP))]
    paths = [folder / name for name in ("scene.png", "overlay.png", "report.html")]
    figures[0].image.save(paths[0])
    strip([(figure.caption, figure.image) for figure in shown]).save(paths[1])
    page = html_report(
        "Fewer visual tokens, same questions",
        lead=(
            "A tiny LLaVA answers questions about a scene it never saw. Each picture shows which "
            "patches became one visual token: same colour and outline, same token. Outlined in "
            "white: kept as it is. Grey: dropped."
        ),
        figures=figures,
        tables=[_answer_table(scene, answers), _score_table(list(scores))],
        footer=_provenance(run, seed),
    )
    paths[2].write_text(page, encoding="utf-8")
    return paths


def _kept(keep: float) -> str:
    return f"{keep:.0%} of the tokens"


def _figures(run: Demo, scene_id: int) -> list[Figure]:
    image = scene_image(scene_id, SPLIT, PICTURE_SIZE)
    figures = [Figure(image, "The picture")]
    # What the model looks at is the canonical picture; the large one is drawn for the reader.
    model_input = scene_image(scene_id, SPLIT)
    for setting in [*settings(SHOWN_KEEP)[1:], settings(min(KEEPS))[1]]:
        groups = run.groups(setting, model_input)
        drawn = overlay(image, groups, size=PICTURE_SIZE)
        caption = f"{setting.name}, {groups.tokens} tokens"
        figures.append(Figure(drawn, caption, _kept(setting.config.budget.keep or 1.0)))
    return figures


def _answer_table(scene: Sequence[Sample], outcomes: Sequence[Outcome]) -> Table:
    rows: list[list[str | Cell]] = []
    for index, sample in enumerate(scene):
        given = [Cell(o.answers[index], bool(o.correct[index])) for o in outcomes]
        rows.append([sample.question, sample.answer, *given])
    return Table(
        f"Questions about this scene, {_kept(SHOWN_KEEP)}",
        ["question", "right answer", *(outcome.setting.name for outcome in outcomes)],
        rows,
    )


def _score_table(scores: list[Score]) -> Table:
    tokens = [score.outcome.tokens for score in scores]
    changes = [i for i in range(1, len(tokens)) if tokens[i] != tokens[i - 1]]
    return Table(
        f"{len(scores[0].outcome.answers)} held-out questions, every type equally often",
        ["method", "tokens", "right", "95 % interval", "prefill", "ratio", "KV cache"],
        [score_row(score, scores[0]) for score in scores],
        note=note(scores),
        numbers=frozenset(range(1, 7)),
        starts=frozenset(changes),
    )


def _provenance(run: Demo, seed: int) -> str:
    weight: Any = next(run.model.parameters())
    return (
        f"Measured by pitome-vlm {__version__} demo, seed {seed}: {platform.machine()} "
        f"{weight.device.type}, {torch.get_num_threads()} thread, {weight.dtype}; "
        f"torch {torch.__version__}, transformers "
        f"{transformers.__version__}, Python {platform.python_version()}."
    )
