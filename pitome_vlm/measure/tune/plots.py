"""Loss against tokens for every recipe, with the target and what was checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..plots import figure, rendered, style
from .cells import Cell
from .search import within
from .verdict import named

# The axis is linear up to this many percent, so that large losses do not squeeze the part near the
# target.
_LINEAR = 10.0
_TICKS = (-50, -20, -10, -5, 0, 5, 10, 20, 50, 100)


def draw(
    cells: Sequence[Cell], checks: Sequence[Cell], *, max_loss: float, answered: bool
) -> bytes:
    """A PNG; the same cells always give the same file.

    Args:
        cells: cells of the search part, drawn as one line per recipe.
        checks: cells of the check part, drawn as diamonds with intervals.
        max_loss: the target, as a share.
        answered: losses are of accuracy; otherwise of agreement with the unreduced model.

    Raises:
        ImportError: matplotlib is not installed.
    """
    drawn = figure(8.4, 4.6)
    axes = drawn.subplots()
    _search_lines(axes, cells)
    axes.axhline(100 * max_loss, color="0.25", ls="--", lw=1.2, label="target")
    _checks(axes, checks, max_loss)
    axes.set_xscale("log", base=2)
    counts = sorted({cell.tokens for cell in (*cells, *checks)})
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_xlabel("visual tokens per image (log scale)")
    _loss_axis(axes, cells, checks, max_loss)
    what = "accuracy" if answered else "agreement"
    axes.set_ylabel(f"loss of {what}, % of unreduced (linear to {_LINEAR:.0f})")
    axes.set_title("Search: lines. Check, on other questions: diamonds with interval", fontsize=10)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    drawn.legend(loc="outside right upper", fontsize=7)
    return rendered(drawn)


def _loss_axis(axes: Any, cells: Sequence[Cell], checks: Sequence[Cell], max_loss: float) -> None:
    ends = [100 * cell.loss.value for cell in cells] + [100 * max_loss]
    ends += [100 * end for cell in checks for end in (cell.loss.low, cell.loss.high)]
    low, high = min(-1.0, *ends), max(2.0, *ends)
    axes.set_yscale("symlog", linthresh=_LINEAR, linscale=2)
    axes.set_ylim(1.15 * low, 1.15 * high)
    shown = [tick for tick in _TICKS if 1.15 * low <= tick <= 1.15 * high]
    axes.set_yticks(shown, [str(tick) for tick in shown])


def _search_lines(axes: Any, cells: Sequence[Cell]) -> None:
    names = list(dict.fromkeys(cell.recipe.name for cell in cells))
    for index, name in enumerate(names):
        line = sorted(
            (cell.tokens, 100 * cell.loss.value) for cell in cells if cell.recipe.name == name
        )
        axes.plot(
            [tokens for tokens, _ in line],
            [loss for _, loss in line],
            **style(index, name),
        )


def _checks(axes: Any, checks: Sequence[Cell], max_loss: float) -> None:
    for cell in checks:
        loss, kept = cell.loss, within(cell.loss.value, max_loss)
        axes.errorbar(
            [cell.tokens],
            [100 * loss.value],
            yerr=[
                [100 * max(0.0, loss.value - loss.low)],
                [100 * max(0.0, loss.high - loss.value)],
            ],
            color="black",
            marker="D",
            mfc="black" if kept else "white",
            ms=8,
            lw=1.6,
            capsize=4,
            ls="",
            zorder=5,
            label=f"{'chosen' if kept else 'checked, missed'}: {named(cell)}",
        )
