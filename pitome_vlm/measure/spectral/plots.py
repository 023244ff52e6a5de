"""The plot of a spectral verification, as a PNG.

Knows: matplotlib, used without its global state. Does not know: where the numbers come from.
"""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from .report import sizes_text
from .study import Case, CaseResult, FeatureRow

# Okabe and Ito's palette, which the colour-blind can tell apart.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_MARKERS = "os^Dv*P"
_COLUMNS = 2


def check_matplotlib() -> None:
    """Say how to install what is missing, before anything is measured.

    Raises:
        ImportError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ImportError(
            'the plot needs matplotlib; install it with: pip install "pitome-vlm[viz]", or give '
            "--no-plot"
        )


def draw(results: Sequence[CaseResult], rows: Sequence[FeatureRow]) -> bytes:
    """A PNG: SD by noise for every case worth a panel, SD / N by layer for real features.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: nothing to draw.
    """
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = _shown(results)
    panels = len(shown) + bool(rows)
    if not panels:
        raise ValueError("there is nothing to draw: no synthetic runs and no real features")
    columns = min(panels, _COLUMNS)
    lines = math.ceil(panels / columns)
    figure = Figure(figsize=(4.6 * columns, 3.4 * lines), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    names = list(dict.fromkeys([r.algorithm for r in results] + [r.algorithm for r in rows]))
    for one, case in zip(axes, shown, strict=False):
        _noise_panel(one, case, [r for r in results if r.case == case], names)
    if rows:
        _layer_panel(axes[len(shown)], rows, names)
    for spare in axes[panels:]:
        spare.set_axis_off()
    axes[0].legend(fontsize=8)
    data = io.BytesIO()
    # Without the version of matplotlib in it, the same numbers always give the same file.
    figure.savefig(data, format="png", metadata={"Software": None})
    return data.getvalue()


def _shown(results: Sequence[CaseResult]) -> list[Case]:
    """The theorem's own ground (first sizes, one step) and its end (last sizes, all steps)."""
    cases = list(dict.fromkeys(result.case for result in results))
    if not cases:
        return []
    few, many = min(c.steps for c in cases), max(c.steps for c in cases)
    own = [c for c in cases if c.sizes == cases[0].sizes and c.steps == few]
    end = [c for c in cases if c.sizes == cases[-1].sizes and c.steps == many]
    return list(dict.fromkeys([*own, *end[:1]]))


def _style(name: str, names: Sequence[str]) -> dict[str, Any]:
    index = names.index(name)
    return {
        "color": _COLOURS[index % len(_COLOURS)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "ms": 5,
        "lw": 1.3,
        "label": name,
    }


def _noise_panel(
    axes: Any, case: Case, results: Sequence[CaseResult], names: Sequence[str]
) -> None:
    for name in names:
        own = sorted((r for r in results if r.algorithm == name), key=lambda r: r.sigma)
        if not own:
            continue
        distances = [result.distance for result in own]
        # Nothing merged means exactly zero, which a logarithmic axis cannot show.
        places = [d if d > 0 else math.nan for d in distances]
        axes.plot([r.sigma for r in own], places, **_style(name, names))
    axes.set_xscale("log")
    axes.set_yscale("log")
    steps = "1 step" if case.steps == 1 else f"{case.steps} steps"
    axes.set_title(f"{sizes_text(case.sizes)}, {case.layout}, {steps}", fontsize=10)
    axes.set_xlabel("noise sigma")
    axes.set_ylabel("spectral distance")
    axes.grid(alpha=0.3)


def _layer_panel(axes: Any, rows: Sequence[FeatureRow], names: Sequence[str]) -> None:
    for name in names:
        own = [row for row in rows if row.algorithm == name and row.layer is not None]
        if own:
            means = [statistics.fmean(row.distance) for row in own]
            axes.plot([row.layer for row in own], means, **_style(name, names))
    axes.set_ylim(bottom=0)
    axes.locator_params(axis="x", integer=True)
    axes.set_title("real features, own tokens of every algorithm", fontsize=10)
    axes.set_xlabel("tower layer")
    axes.set_ylabel("spectral distance / N")
    axes.grid(alpha=0.3)
