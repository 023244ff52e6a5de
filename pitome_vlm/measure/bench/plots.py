"""A picture of where the time of an answer goes.

Knows: matplotlib, where it is there. Does not know: how numbers were made.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .phases import Phases
from .report import Report

PARTS = ("tower", "merge", "projector", "prompt", "prefill")
COLOURS = ("#4477aa", "#cc3311", "#bbbbbb", "#ddcc77", "#228833", "#aa4499")


def check_plot(path: Path) -> None:
    """See that a plot could be made, before anything is measured.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: a kind of file it cannot write.
    """
    known = _figure(1).canvas.get_supported_filetypes()
    kind = path.suffix.removeprefix(".").lower()
    if kind not in known:
        raise ValueError(f"plot must end in one of {', '.join(sorted(known))}, got {str(path)!r}")


def plot(report: Report, path: Path) -> None:
    """Bars of what a user waits for, one per budget and batch size.

    Raises:
        ImportError: matplotlib is missing.
    """
    cases = [[one for one in case if one.repeats] for case in report.results]
    cases = [case for case in cases if case]
    figure = _figure(len(cases))
    axes = figure.subplots(1, len(cases), squeeze=False)[0]
    for axis, case in zip(axes, cases, strict=True):
        _bars(axis, case)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=3)
    whole = ", language model scaled to its whole depth" if report.depth != 1 else ""
    figure.suptitle(f"{report.model}: time of an answer{whole}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _bars(axis: Any, case: list[Phases]) -> None:
    names = [_label(one) for one in case]
    below = [0.0] * len(case)
    for colour, label, heights in zip(COLOURS, (*PARTS, "decode"), _heights(case), strict=True):
        axis.bar(names, heights, bottom=below, label=label, color=colour)
        below = [a + b for a, b in zip(below, heights, strict=True)]
    for index, (one, top) in enumerate(zip(case, below, strict=True)):
        sooner = case[0].whole.first / one.whole.first
        axis.annotate(f"first {sooner:.2f}x", (index, top), ha="center", va="bottom", fontsize=7)
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


def _figure(panels: int) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "a plot needs matplotlib: pip install 'pitome-vlm[viz]', or leave out --plot"
        ) from error
    return Figure(figsize=(1.2 + 4.4 * panels, 4.2), layout="constrained")
