"""Where merging costs too much: question types and kinds of scene that lose more than a bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pitome_vlm.common import markdown_table
from pitome_vlm.demo import Sample
from pitome_vlm.measure.demo_benchmark import difference_interval

# Percentage points.
BOUND = 1.0
_PARTS = {"question_type": "question type", "kind": "kind of scene"}


def where_not(
    samples: Sequence[Sample], unreduced: np.ndarray, merged: Mapping[int, np.ndarray]
) -> list[str]:
    """The section of the report that warns, "none" where nothing loses more than `BOUND`.

    Args:
        samples: the questions.
        unreduced: [questions] share of right answers, without merging.
        merged: the same by token count, largest first.
    """
    lines = [
        line
        for attribute, title in _PARTS.items()
        for line in _lines(samples, unreduced, merged, attribute, title)
    ]
    columns = ["", "questions", "unreduced %", *(f"{tokens} tokens" for tokens in merged)]
    shown = markdown_table(columns, lines) if lines else "None."
    note = (
        f"Question types and kinds of scene whose loss under the default exceeds {BOUND:g} point: "
        f"the whole 95 % interval of the paired difference lies below -{BOUND:g}. Points, with "
        "that interval; cells without a number do not exceed it. Not corrected for the number of "
        "types: a warning too many costs less than one too few."
    )
    return ["## Do not merge here", "", shown, "", note, ""]


def _lines(
    samples: Sequence[Sample],
    unreduced: np.ndarray,
    merged: Mapping[int, np.ndarray],
    attribute: str,
    title: str,
) -> list[list[str]]:
    labels = np.array([getattr(sample, attribute) for sample in samples])
    lines = []
    for label in sorted(set(labels)):
        own = np.flatnonzero(labels == label)
        asked, base = [samples[place] for place in own], unreduced[own]
        cells = [_loss(asked, base, correct[own]) for correct in merged.values()]
        if any(cells):
            lines.append([f"{title}: {label}", str(len(own)), f"{100 * base.mean():.1f}", *cells])
    return lines


def _loss(samples: Sequence[Sample], base: np.ndarray, correct: np.ndarray) -> str:
    """The loss with its interval; nothing where it does not exceed the bound."""
    low, high = difference_interval(samples, correct, base)
    if high >= -BOUND:
        return ""
    return f"{100 * (correct.mean() - base.mean()):+.1f} [{low:+.1f}, {high:+.1f}]"
