"""A plot of where the time of an answer goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..plots import colours, panels, save
from .phases import Phases
from .report import Report

PARTS = ("tower", "merge", "projector", "prompt", "prefill")


def plot(report: Report, path: Path) -> None:
    """Write stacked bars of the times of an answer, one bar per budget and batch size."""
    cases = [[one for one in case if one.repeats] for case in report.results]
    cases = [case for case in cases if case]
    figure, axes = panels(len(cases), len(cases), 4.8, 4.2)
    for axis, case in zip(axes, cases, strict=True):
        _bars(axis, case)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=3)
    # In a line of its own: over a single panel there is no room for it next to the rest.
    whole = "\nlanguage model scaled to full depth" if report.depth != 1 else ""
    figure.suptitle(f"{report.model}: time of an answer{whole}", fontsize=10)
    save(figure, path)


def _bars(axis: Any, case: list[Phases]) -> None:
    names = [_label(one) for one in case]
    below = [0.0] * len(case)
    labels = (*PARTS, "decode")
    shades = colours(len(labels))
    for colour, label, heights in zip(shades, labels, _heights(case), strict=True):
        axis.bar(names, heights, bottom=below, label=label, color=colour)
        below = [a + b for a, b in zip(below, heights, strict=True)]
    for index, (one, top) in enumerate(zip(case, below, strict=True)):
        faster = case[0].whole.first / one.whole.first
        axis.annotate(f"first {faster:.2f}x", (index, top), ha="center", va="bottom", fontsize=7)
    asked = case[0].case
    axis.set_title(f"batch {asked.batch}, {asked.answer_tokens} tokens of answer", fontsize=9)
    axis.set_ylabel("ms")
    axis.margins(y=0.08)
    axis.tick_params(axis="x", labelsize=7)


def _heights(case: list[Phases]) -> list[list[float]]:
    steps = case[0].case.answer_tokens - 1
    rows = [[one.median(name) for one in case] for name in PARTS[:-1]]
    return [*rows, [x.whole.prefill for x in case], [steps * x.whole.decode for x in case]]


def _label(one: Phases) -> str:
    return "\n".join([*one.budget.name.split(" "), f"{one.tokens} tokens"])
