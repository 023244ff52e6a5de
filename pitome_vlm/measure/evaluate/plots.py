"""Accuracy against tokens and against time, as PNG files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..plots import panels as new_panels
from ..plots import rendered, style

_MOST_COLUMNS = 3


@dataclass(frozen=True)
class Point:
    """Tokens or milliseconds, and accuracy in percent with its interval."""

    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class Panel:
    """One task: points by method, and the unreduced model where it is there."""

    title: str
    lines: Mapping[str, Sequence[Point]]
    base: Point | None


def draw(panels: Sequence[Panel], x_label: str, *, budgets: bool) -> bytes:
    """A PNG with one panel per task; x is logarithmic, points of a method are connected.

    Args:
        panels: one per task.
        x_label: what x is.
        budgets: methods share their values of x, which are then the ticks, and are drawn a little
            apart. Measured values of x stay where they are.
    """
    width = 6.2 if len(panels) == 1 else 4.4
    figure, axes = new_panels(len(panels), _MOST_COLUMNS, width, 4.2)
    methods = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    for one, panel in zip(axes, panels, strict=True):
        _panel(one, panel, methods, budgets)
        one.set_xlabel(x_label)
        one.set_ylabel("questions right, %")
    axes[0].legend(fontsize=8, framealpha=0.9)
    return rendered(figure)


def _panel(axes: Any, panel: Panel, methods: Sequence[str], budgets: bool) -> None:
    if panel.base:
        axes.axhspan(panel.base.low, panel.base.high, color="0.5", alpha=0.15, lw=0)
        axes.axhline(panel.base.y, color="0.4", ls="--", lw=1, label="unreduced")
        axes.plot([panel.base.x], [panel.base.y], marker="x", color="0.3", ls="")
    for name, line in panel.lines.items():
        index = methods.index(name)
        # A small shift keeps the intervals of neighbouring methods apart.
        shift = 1 + 0.025 * (index - (len(methods) - 1) / 2) if budgets else 1.0
        points = sorted(line, key=lambda point: point.x)
        y = [point.y for point in points]
        below = [max(0.0, point.y - point.low) for point in points]
        above = [max(0.0, point.high - point.y) for point in points]
        axes.errorbar(
            [point.x * shift for point in points],
            y,
            yerr=[below, above],
            capsize=2,
            **style(index, name),
        )
    axes.set_xscale("log")
    _ticks(axes, panel, budgets)
    axes.grid(alpha=0.3)
    axes.set_title(panel.title, fontsize=10)


def _ticks(axes: Any, panel: Panel, budgets: bool) -> None:
    from matplotlib.ticker import NullFormatter, NullLocator

    places = {point.x for line in panel.lines.values() for point in line}
    if panel.base:
        places.add(panel.base.x)
    shown = _apart(sorted(places)) if budgets else _round(min(places), max(places))
    axes.set_xticks(shown, [f"{x:.3g}" for x in shown])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _round(low: float, high: float) -> list[float]:
    """Round numbers from below `low` to above `high`, a handful."""
    first = 10.0 ** math.floor(math.log10(low))
    steps = (1, 1.5, 2, 3, 5, 7) if high < 10 * low else (1, 2, 5)
    grid = [step * first * 10**power for power in range(8) for step in steps]
    inside = [x for x in grid if low * 0.95 <= x <= high * 1.05]
    return inside or [low, high]


def _apart(ticks: Sequence[float]) -> list[float]:
    """Some of the ticks, so that their labels do not touch on a logarithmic axis."""
    if not ticks:
        return []
    shown = [ticks[0]]
    least = (ticks[-1] / ticks[0]) ** 0.09
    for tick in ticks[1:]:
        if tick >= shown[-1] * max(least, 1.01):
            shown.append(tick)
    return shown
