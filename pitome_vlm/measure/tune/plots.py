"""Loss against tokens for every recipe, with the target and what was checked.

Knows: how points and intervals are drawn so that recipes can be told apart without colour. Does
not know: where they come from. Needs matplotlib.
"""

from __future__ import annotations

import io
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from .result import named
from .search import within

if TYPE_CHECKING:
    from .result import TuneResult

# Okabe and Ito's palette, which the colour-blind can tell apart.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
_MARKERS = "os^Dv*PXhp"
_LINES = ("-", "--", ":")
# Percent up to which the axis is linear: what is near the target must not be squeezed by what is
# far from it.
_LINEAR = 10.0
_TICKS = (-50, -20, -10, -5, 0, 5, 10, 20, 50, 100)


def check_matplotlib() -> None:
    """Say how to install what is missing, before hours of measuring.

    Raises:
        ImportError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ImportError(
            'plots need matplotlib; install it with: pip install "pitome-vlm[viz]", or do without '
            "the plot (--no-plot)"
        )


def draw(result: TuneResult) -> bytes:
    """A PNG; the same result always gives the same file.

    Raises:
        ImportError: matplotlib is not installed.
    """
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    _search_lines(axes, result)
    axes.axhline(100 * result.max_loss, color="0.25", ls="--", lw=1.2, label="target")
    _checks(axes, result)
    axes.set_xscale("log", base=2)
    counts = sorted({cell.tokens for cell in (*result.cells, *result.checks)})
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_xlabel("visual tokens per image (log scale)")
    _loss_axis(axes, result)
    what = "accuracy" if result.answered else "agreement"
    axes.set_ylabel(f"loss of {what}, % of unreduced (linear to {_LINEAR:.0f})")
    axes.set_title("Search: lines. Check, on other questions: diamonds with interval", fontsize=10)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=7)
    data = io.BytesIO()
    figure.savefig(data, format="png", metadata={"Software": None})
    return data.getvalue()


def _loss_axis(axes: Any, result: TuneResult) -> None:
    ends = [100 * cell.loss.value for cell in result.cells] + [100 * result.max_loss]
    ends += [100 * end for cell in result.checks for end in (cell.loss.low, cell.loss.high)]
    low, high = min(-1.0, *ends), max(2.0, *ends)
    axes.set_yscale("symlog", linthresh=_LINEAR, linscale=2)
    axes.set_ylim(1.15 * low, 1.15 * high)
    shown = [tick for tick in _TICKS if 1.15 * low <= tick <= 1.15 * high]
    axes.set_yticks(shown, [str(tick) for tick in shown])


def _search_lines(axes: Any, result: TuneResult) -> None:
    names = list(dict.fromkeys(cell.recipe.name for cell in result.cells))
    for index, name in enumerate(names):
        line = sorted(
            (cell.tokens, 100 * cell.loss.value)
            for cell in result.cells
            if cell.recipe.name == name
        )
        axes.plot(
            [tokens for tokens, _ in line],
            [loss for _, loss in line],
            color=_COLOURS[index % len(_COLOURS)],
            marker=_MARKERS[index % len(_MARKERS)],
            ls=_LINES[index // len(_COLOURS) % len(_LINES)],
            ms=5,
            lw=1.2,
            label=name,
        )


def _checks(axes: Any, result: TuneResult) -> None:
    for cell in result.checks:
        loss, kept = cell.loss, within(cell.loss.value, result.max_loss)
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
