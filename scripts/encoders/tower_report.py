"""The page and the plot of the study of a real tower."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pitome_vlm.common import markdown_table
from pitome_vlm.measure.provenance import in_words
from pitome_vlm.measure.stats import Interval, mean_interval, simultaneous_intervals

from .tower_cells import DEFAULT, LEVELS, RECIPES
from .tower_weights import PROVENANCE

UNMERGED, YARDSTICK = "none", "tome"
Scores = Callable[[Mapping[str, Any]], np.ndarray]


def _first(cell: Mapping[str, Any]) -> np.ndarray:
    """Percent of an emoji's two searches that find its own twin first."""
    return 100.0 * (np.array(cell["ranks"]) == 0).mean(0)


# Title -> scores of a cell, one per emoji, digit or photo, and what they can be at most.
MEASURES: dict[str, tuple[Scores, float]] = {
    "retrieval R@1, %": (_first, 100.0),
    "emoji groups, %": (lambda cell: 100.0 * np.array(cell["groups"]), 100.0),
    "digits, %": (lambda cell: 100.0 * np.array(cell["digits"]), 100.0),
    "photos, CLS cosine": (lambda cell: np.array(cell["photo_cls"]), 1.0),
    "photos, patch correlation": (lambda cell: np.array(cell["photo_patches"]), 1.0),
}


def interval(scores: np.ndarray, most: float) -> Interval:
    """95 % interval of a mean, items resampled."""
    return mean_interval(scores, range(len(scores)), extremes=_extremes(scores, 0.0, most))


def together(differences: Sequence[np.ndarray], most: float) -> list[Interval]:
    """Intervals of paired differences on the same items that hold together.

    With 99 %, so that those of all five measures do with 95 % (Bonferroni).
    """
    extremes = [_extremes(one, -most, most) for one in differences]
    items, level = range(len(differences[0])), 1 - 0.05 / len(MEASURES)
    return simultaneous_intervals(differences, items, extremes=extremes, level=level)


def _extremes(scores: np.ndarray, least: float, most: float) -> tuple[float, float]:
    """The scores of the two added items: the lowest and the highest that there can be.

    Of a cosine, which hardly ever is -1, those that there are.
    """
    return (float(scores.min()), float(scores.max())) if most == 1.0 else (least, most)


def _digits(most: float) -> int:
    return 1 if most == 100.0 else 3


def level_table(cells: Mapping[str, Any], level: float) -> str:
    """All recipes at a level: means, the retrieval's with its interval."""
    lines = []
    for name in (UNMERGED, *RECIPES):
        cell = cells.get(name if name == UNMERGED else f"{name}/{level:g}")
        if cell is None:
            continue
        line = [name, str(cell["tokens"].get("google", "all"))]
        for title, (scores, most) in MEASURES.items():
            found, places = scores(cell), _digits(most)
            shown = f"{found.mean():.{places}f}"
            if title.startswith("retrieval"):
                low, high = interval(found, most)
                shown += f" ({low:.1f} to {high:.1f})"
            line.append(shown)
        lines.append(line)
    return markdown_table(["recipe", "tokens of 145", *MEASURES], lines)


def against(cells: Mapping[str, Any], other: str) -> str:
    """Every recipe minus another one on the same items, at every level."""
    shown: dict[tuple[str, str, float], str] = {}
    for title, (scores, most) in MEASURES.items():
        pairs = {
            (name, level): scores(cells[f"{name}/{level:g}"]) - scores(cells[f"{other}/{level:g}"])
            for name in RECIPES
            for level in LEVELS
            if name != other and {f"{name}/{level:g}", f"{other}/{level:g}"} <= set(cells)
        }
        places = _digits(most)
        ends = together(list(pairs.values()), most)
        for ((name, level), difference), (low, high) in zip(pairs.items(), ends, strict=True):
            text = f"{difference.mean():+.{places}f} ({low:+.{places}f} to {high:+.{places}f})"
            shown[name, title, level] = f"**{text}**" if low > 0 or high < 0 else text
    lines = [
        [name, title, *(shown.get((name, title, level), "") for level in LEVELS)]
        for name in RECIPES
        for title in MEASURES
        if any((name, title, level) in shown for level in LEVELS)
    ]
    head = ["recipe", "measure", *(f"FLOPs {round(100 * level)} %" for level in LEVELS)]
    return markdown_table(head, lines)


def spectral_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """What merging does to the spectrum of the photos' first keys."""
    lines = [
        [
            row["algorithm"],
            f"{row['tokens'][0]} -> {row['tokens'][1]}",
            *(f"{row[name]:.4f}" for name in ("distance", "distance_blind")),
            *(f"{row[name]:.2f}" for name in ("kept", "kept_blind")),
        ]
        for row in rows
    ]
    head = ["algorithm", "patches", "SD / N", "blind groups", "eigenspace kept", "blind groups"]
    return markdown_table(head, lines)


def report(results: Mapping[str, Any]) -> str:
    """The whole page."""
    cells, sizes = results["cells"], results["sizes"]
    wanted = {f"{name}/{level:g}" for name in RECIPES for level in LEVELS}
    missing = len(wanted - set(cells))
    parts = [
        "# Merging in a real pretrained tower",
        PROVENANCE,
        "Converted into `Dinov2Model`; its last hidden state differs from that inside the "
        f"package's own graph by {results['check']:.0e} of its root mean square at most. Merged "
        "off the shelf: the readers of its features were made from the unmerged tower.",
        f"- Retrieval: {sizes['emoji']} emoji at 168 pixels; those of one vendor are searched for "
        "among those of the other by the cosine of class tokens, both ways.\n"
        f"- Linear probes on class tokens: the group of an emoji (learned on {sizes['train']} "
        f"others of the one vendor, tried on the other's), and {sizes['digits']} MNIST digits "
        f"(learned on {sizes['train']}).\n"
        f"- Photos: {len(cells[UNMERGED]['photo_cls'])} that scikit-image and scikit-learn ship, "
        "at 224 pixels; merged against unmerged features.",
        "Every recipe leaves the count whose FLOPs (layers, with comparing tokens) are nearest to "
        "the level. All layers merge unless it says otherwise. Intervals of means: 95 %, items "
        "resampled, each for itself.",
    ]
    times = [cell["seconds"] for cell in cells.values() if "seconds" in cell]
    if times:
        parts.append(f"A cell takes {min(times):.0f} to {max(times):.0f} seconds of one core.")
    if missing:
        parts.append(f"**{missing} of {len(wanted)} cells are not measured yet.** The run resumes.")
    parts.append("![scores by FLOPs](scores.png)")
    for level in LEVELS:
        if any(name.endswith(f"/{level:g}") for name in cells):
            parts += [f"## {round(100 * level)} % of the FLOPs", level_table(cells, level)]
    for other in (YARDSTICK, DEFAULT):
        if any(f"{other}/{level:g}" in cells for level in LEVELS):
            parts += [
                f"## Minus {other}",
                "Bold: the interval does not hold 0. Intervals are simultaneous: those of this "
                "table hold together with 95 % (max-t bootstrap over items for every measure, "
                "Bonferroni for the five measures).",
                against(cells, other),
            ]
    if results.get("spectral"):
        parts += [
            "## Spectra",
            "Photos at r = 0.9 in every layer, all merges as one partition of the patches, on the "
            "graph of the first layer's keys (docs/spectral.md).",
            spectral_table(results["spectral"]),
        ]
    parts.append(f"Measured on: {in_words(results['provenance'])}.")
    return "\n\n".join(parts) + "\n"


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Every measure by level, a line per recipe that was measured at more than one."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(13, 7.5), dpi=130)
    cells, panels = results["cells"], list(axes.flat)
    for (title, (scores, _)), panel in zip(MEASURES.items(), panels, strict=False):
        for index, name in enumerate(RECIPES):
            found = [
                (100 * level, scores(cells[f"{name}/{level:g}"]).mean())
                for level in LEVELS
                if f"{name}/{level:g}" in cells
            ]
            if found:
                marker, style = "osD^v"[index // 10], "-" if index < 10 else ":"
                panel.plot(
                    *zip(*found, strict=True), marker + style, color=f"C{index % 10}", label=name
                )
        panel.axhline(scores(cells[UNMERGED]).mean(), color="0.4", ls="--", lw=1)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("% of the FLOPs")
        panel.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    panels[-1].axis("off")
    panels[-1].legend(handles, labels, fontsize=8, loc="center")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
