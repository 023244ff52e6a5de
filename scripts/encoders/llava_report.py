"""The page about the LLaVA on the real tower."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from pitome_vlm.common import markdown_table
from pitome_vlm.demo import Sample
from pitome_vlm.measure.demo_benchmark import (
    accuracy_interval,
    difference_intervals,
    family_words,
)

from ..demo.report import (
    BASELINE,
    BUDGETS,
    RECOMMENDED,
    Row,
    against_recommended,
    breakdown,
    kept_share,
)
from ..demo.where_not import where_not
from . import llava_measure
from .llava_measure import NOT_CALIBRATED, every_row
from .tower_weights import PROVENANCE

SHARES = ("1/2", "1/4", "1/8", "1/16")


def by_row(rows: Sequence[Row]) -> dict[tuple[str, int], np.ndarray]:
    """[questions] share of right answers by method and tokens."""
    return {(row.name, row.tokens): row.correct for row in rows}


def whole(rows: Sequence[Row], budgets: Sequence[int]) -> list[str]:
    """Names of the methods that are measured at all budgets."""
    found = by_row(rows)
    names = dict.fromkeys(row.name for row in rows if row.name != BASELINE)
    return [name for name in names if all((name, tokens) in found for tokens in budgets)]


def unreduced(rows: Sequence[Row]) -> np.ndarray:
    """[questions] right without merging."""
    return next(row for row in rows if row.name == BASELINE).correct


def with_intervals(
    samples: list[Sample], differences: dict[tuple[str, int], np.ndarray]
) -> dict[tuple[str, int], str]:
    """Cells of a table, by method and tokens, from [questions] paired differences."""
    ends = difference_intervals(samples, list(differences.values()))
    return {
        key: f"{100 * one.mean():+.1f} ({low:+.1f} to {high:+.1f})"
        for (key, one), (low, high) in zip(differences.items(), ends, strict=True)
    }


def accuracy_table(samples: list[Sample], rows: list[Row], demo: list[Row]) -> list[str]:
    """Every calibrated method, in points minus no merging, and the same on the demo model."""
    theirs, base, demo_base = by_row(demo), unreduced(rows), unreduced(demo)
    low, high = accuracy_interval(samples, base)
    pairs = {
        key: right - base
        for key, right in by_row(rows).items()
        if key[0] != BASELINE and not key[0].endswith(NOT_CALIBRATED)
    }
    found, lines = with_intervals(samples, pairs), []
    for name in dict.fromkeys(name for name, _ in pairs):
        cells = [found.get((name, tokens), "not measured") for tokens in llava_measure.BUDGETS]
        for tokens in BUDGETS:
            right = theirs.get((name, tokens))
            cells.append("" if right is None else f"{100 * (right.mean() - demo_base.mean()):+.1f}")
        lines.append([name, *cells])
    columns = ["method", *(f"{one} of 256" for one in SHARES), *(f"demo, {one}" for one in SHARES)]
    words = (
        f"Without merging: **{100 * base.mean():.1f} %** ({low:.1f} to {high:.1f}) of "
        f"{len(base)} questions, on the demo model {100 * demo_base.mean():.1f} % of its own "
        f"{len(demo_base)}. Cells are points minus that. {family_words(len(pairs))}"
    )
    return ["## Accuracy", "", words, "", markdown_table(columns, lines), ""]


def rankings(rows: list[Row], demo: list[Row]) -> list[str]:
    """How alike the order of the methods is on the two models."""
    own, theirs = by_row(rows), by_row(demo)
    cells = []
    for tokens, demo_tokens in zip(llava_measure.BUDGETS, BUDGETS, strict=True):
        names = [
            name
            for name in whole(demo, BUDGETS)
            if (name, tokens) in own and (name, demo_tokens) in theirs
        ]
        if len(names) < 3:
            cells.append("")
            continue
        pairs = [(own[name, tokens].mean(), theirs[name, demo_tokens].mean()) for name in names]
        rank = spearmanr(*zip(*pairs, strict=True)).statistic
        cells.append(f"{rank:.2f} ({len(names)} methods)")
    shown = markdown_table(["", *SHARES], [["Spearman's correlation of accuracies", *cells]])
    words = "1: the methods are in the same order on the real tower as on the demo's; 0: unrelated."
    return ["## Do the demo's rankings hold?", "", words, "", shown, ""]


def calibration(samples: list[Sample], rows: list[Row]) -> list[str]:
    """What calibration is worth for every algorithm: with minus without."""
    found = by_row(rows)
    both = {
        (name, tokens): (right, found[f"{name}{NOT_CALIBRATED}", tokens])
        for (name, tokens), right in found.items()
        if (f"{name}{NOT_CALIBRATED}", tokens) in found
    }
    if not both:
        return ["## Calibration", "", "Not measured yet.", ""]
    told = with_intervals(samples, {key: one - other for key, (one, other) in both.items()})
    lines = []
    for name in dict.fromkeys(name for name, _ in both):
        cells = []
        for key in [(name, tokens) for tokens in llava_measure.BUDGETS]:
            one, other = both.get(key, (None, None))
            if one is None or other is None:
                cells.append("not measured")
            else:
                cells.append(f"{100 * one.mean():.1f} / {100 * other.mean():.1f}, {told[key]}")
        lines.append([name, *cells])
    columns = ["algorithm", *(f"{one} of 256" for one in SHARES)]
    words = (
        "Accuracy with calibration (log-size bias, mean positions) and without, and the "
        f"difference. {family_words(len(both))}"
    )
    return ["## Calibration", "", words, "", markdown_table(columns, lines), ""]


def guessed(samples: Sequence[Sample]) -> float:
    """Percent right of whoever gives the most common answer to every type of question."""
    counts = Counter((sample.question_type, sample.answer) for sample in samples)
    best: dict[str, int] = {}
    for (kind, _), count in counts.items():
        best[kind] = max(best.get(kind, 0), count)
    return 100 * sum(best.values()) / len(samples)


def report(
    samples: list[Sample],
    rows: list[Row],
    demo: list[Row],
    facts: dict[str, Any],
    trained: str,
    later: Sequence[str] = (),
) -> str:
    """The whole page.

    Args:
        samples: the questions.
        rows: what was measured.
        demo: the rows of the demo benchmark.
        facts: of the run.
        trained: a sentence about the training.
        later: which rows other runs measured.
    """
    wanted = {(one.name, one.budget) for one in every_row() if one.budget}
    gaps = len(wanted - by_row(rows).keys())
    scenes = len({sample.scene_id for sample in samples})
    head = [
        "# A LLaVA on a real pretrained tower",
        "",
        PROVENANCE,
        "",
        "The tower is frozen; projector and language model (the demo's sizes) were trained on its "
        "features by the demo's recipe, never with merging. Scenes: one to six emoji of two "
        "vendors and a written digit, on plain grounds and photos; test images hold compositions "
        f"that no training image had. {scenes} images of the {facts['split']} split, "
        f"{len(samples)} questions, greedy, exact match; the most common answer to every type "
        f"gives {guessed(samples):.1f} %. No option was chosen here. `random` is one seed.",
        "",
        trained,
        "",
        f"**{gaps} of {len(wanted)} rows are not measured yet.** The run resumes.\n"
        if gaps
        else "",
        "![accuracy against visual tokens](accuracy.png)",
        "",
    ]
    complete = whole(rows, llava_measure.BUDGETS)
    told = [row for row in rows if row.name in (BASELINE, *complete)]
    parts = accuracy_table(samples, rows, demo) + rankings(rows, demo)
    parts += calibration(samples, rows)
    if RECOMMENDED in complete:
        merged = {row.tokens: row.correct for row in rows if row.name == RECOMMENDED}
        parts += kept_share(samples, told) + against_recommended(samples, told)
        parts += where_not(samples, unreduced(rows), merged)
    shown = [row for row in told if not row.name.endswith(NOT_CALIBRATED)]
    parts += breakdown(samples, shown, "question_type", "question type")
    told_facts = ", ".join(f"{key} {value}" for key, value in facts.items() if key != "command")
    foot = [f"Measured on: {told_facts}.", *later, f"Made by `{facts['command']}`."]
    return "\n".join([*head, *parts, "\n\n".join(foot), ""])
