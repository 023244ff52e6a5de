"""The plot of a spectral verification, as a PNG."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from .. import plots
from .report import sizes_text, steps_text
from .study import Case, CaseResult, FeatureRow

_COLUMNS = 2


def draw(results: Sequence[CaseResult], rows: Sequence[FeatureRow]) -> bytes:
    """A PNG: SD by noise for the cases that matter, SD / N by layer for real features.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: nothing to draw.
    """
    shown = _shown(results)
    panels = len(shown) + bool(rows)
    if not panels:
        raise ValueError("there is nothing to draw: no synthetic runs and no real features")
    figure, axes = plots.panels(panels, _COLUMNS, 4.6, 3.4)
    names = list(dict.fromkeys([r.algorithm for r in results] + [r.algorithm for r in rows]))
    for one, case in zip(axes, shown, strict=False):
        _noise_panel(one, case, [r for r in results if r.case == case], names)
    if rows:
        _layer_panel(axes[len(shown)], rows, names)
    axes[0].legend(fontsize=8)
    return plots.rendered(figure)


def _shown(results: Sequence[CaseResult]) -> list[Case]:
    """The theorem's own setting (first sizes, one step) and the hardest (last sizes, all steps)."""
    cases = list(dict.fromkeys(result.case for result in results))
    if not cases:
        return []
    few, many = min(c.steps for c in cases), max(c.steps for c in cases)
    most = max(c.ratio for c in cases)
    own = [c for c in cases if c.sizes == cases[0].sizes and (c.steps, c.ratio) == (few, most)]
    end = [c for c in cases if c.sizes == cases[-1].sizes and c.steps == many]
    return list(dict.fromkeys([*own, *end[:1]]))


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
        axes.plot([r.sigma for r in own], places, **plots.style(names.index(name), name))
    axes.set_xscale("log")
    axes.set_yscale("log")
    title = f"{sizes_text(case.sizes)}, {case.layout}, {steps_text(case)}"
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("noise sigma")
    axes.set_ylabel("spectral distance")
    axes.grid(alpha=0.3)


def _layer_panel(axes: Any, rows: Sequence[FeatureRow], names: Sequence[str]) -> None:
    for name in names:
        own = [row for row in rows if row.algorithm == name and row.layer is not None]
        if own:
            means = [statistics.fmean(row.distance) for row in own]
            axes.plot([row.layer for row in own], means, **plots.style(names.index(name), name))
    axes.set_ylim(bottom=0)
    axes.locator_params(axis="x", integer=True)
    axes.set_title("real features, own tokens of every algorithm", fontsize=10)
    axes.set_xlabel("tower layer")
    axes.set_ylabel("spectral distance / N")
    axes.grid(alpha=0.3)
