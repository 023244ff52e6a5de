"""Where merging costs too much: question types and kinds of scene that lose more than a bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pitome_vlm.common import markdown_table
from pitome_vlm.demo import Sample
from pitome_vlm.measure.demo_benchmark import difference_intervals, family_words
from pitome_vlm.measure.stats import Interval

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
    parts = _parts_of(samples)
    losses = [
        np.where(own, correct - unreduced, np.nan)
        for own in parts.values()
        for correct in merged.values()
    ]
    ends = iter(difference_intervals(samples, losses))
    lines = []
    for title, own in parts.items():
        cells = [_loss(correct[own] - unreduced[own], next(ends)) for correct in merged.values()]
        if any(cells):
            lines.append([title, str(own.sum()), f"{100 * unreduced[own].mean():.1f}", *cells])
    columns = ["", "questions", "unreduced %", *(f"{tokens} tokens" for tokens in merged)]
    shown = markdown_table(columns, lines) if lines else "None."
    note = (
        f"Question types and kinds of scene whose loss under the default exceeds {BOUND:g} point: "
        f"the whole interval of the paired difference lies below -{BOUND:g}. Points, with that "
        f"interval; cells without a number do not exceed it. {family_words(len(losses))}"
    )
    return ["## Do not merge here", "", shown, "", note, ""]


def _parts_of(samples: Sequence[Sample]) -> dict[str, np.ndarray]:
    """[questions] bool by question type and kind of scene."""
    found = {}
    for attribute, title in _PARTS.items():
        labels = np.array([getattr(sample, attribute) for sample in samples])
        found |= {f"{title}: {label}": labels == label for label in sorted(set(labels))}
    return found


def _loss(differences: np.ndarray, ends: Interval) -> str:
    """The loss with its interval; nothing where it does not exceed the bound."""
    if ends.high >= -BOUND:
        return ""
    return f"{100 * differences.mean():+.1f} [{ends.low:+.1f}, {ends.high:+.1f}]"
