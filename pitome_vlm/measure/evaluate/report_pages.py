"""The report's files: report.md, report.html and two plots.

Handles the order in which things are shown; leaves the tables themselves to `report.py`.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..provenance import in_words
from ..tables import Figure, Table, html_report
from .plots import Panel, Point, draw
from .published_table import published_table
from .records import Folder
from .report import (
    Row,
    accuracy_table,
    cost_table,
    failure_table,
    group_table,
    rows_of,
)
from .suites import BASELINE, Cell

TITLE = "Token reduction: what it saves and what it costs"
_TOKENS = "visual tokens per image (log scale)"
_READING = (
    "Intervals are 95 %, by bootstrap over images (questions about one image fail together), "
    "with two images added that do not exist, one answered right and one wrong, so that few "
    "questions never claim certainty. "
    "Differences are paired: the same questions, this setting minus the unreduced model. "
    "Lost and gained are the questions only the unreduced or only this model answered right, "
    "McNemar is the exact test on those, question by question. The last p is a sign-flip "
    "permutation test by image, corrected for all comparisons on the task (Holm)."
)


@dataclass(frozen=True)
class Plot:
    """A PNG, its file name and what it shows."""

    file: str
    caption: str
    data: bytes


def write_report(
    cells: Sequence[Cell],
    folder: Folder,
    run: Mapping[str, Any],
    failures: Mapping[Cell, str],
    *,
    plots: bool = True,
    published: bool = True,
) -> list[Path]:
    """Write the report of the finished cells, if any; the same cells give the same report.

    Args:
        cells: the cells of the sweep.
        folder: the sweep's folder.
        run: what is the same for all cells, see `sweep.identity`.
        failures: the error of every cell that failed.
        plots: draw them; needs matplotlib.
        published: show published numbers next to the measured ones.
    """
    rows = rows_of(cells, folder)
    if not rows:
        return []
    timing = folder.load_timing()
    drawn = _plots(rows, timing) if plots else []
    tables = _tables(rows, timing, failures, published=published)
    lead, footer = _lead(rows, run), _provenance(rows, run)
    pages = {"report.md": _markdown(tables, drawn, lead, footer)}
    pages["report.html"] = html_report(
        TITLE,
        lead=f"{lead} {_READING}",
        figures=[Figure(Image.open(io.BytesIO(p.data)), p.caption) for p in drawn],
        figure_width="28rem" if len(rows) == 1 else "50rem",
        tables=tables,
        footer=footer,
    )
    files = [folder.write(plot.file, plot.data) for plot in drawn]
    return [*files, *(folder.write(name, text) for name, text in pages.items())]


def _tables(
    rows: Mapping[str, list[Row]],
    timing: Mapping[str, Any] | None,
    failures: Mapping[Cell, str],
    *,
    published: bool,
) -> list[Table]:
    tables = [failure_table({c.name: e for c, e in failures.items()})] if failures else []
    tables += [accuracy_table(task, found) for task, found in rows.items()]
    tables.append(cost_table(next(iter(rows.values())), timing))
    extra = [group_table(task, found) for task, found in rows.items()]
    if published:
        extra += [published_table(task, found) for task, found in rows.items()]
    return [*tables, *(table for table in extra if table is not None)]


def _lead(rows: Mapping[str, list[Row]], run: Mapping[str, Any]) -> str:
    limit = f", the first {run['limit']} questions of each" if run["limit"] else ""
    settings = len({row.cell.setting for found in rows.values() for row in found})
    return (
        f"Model: {run['model']}. Tasks: {', '.join(rows)}{limit}. {settings} settings, greedy "
        "or as the task says, every number measured unless it is labelled otherwise."
    )


def _provenance(rows: Mapping[str, list[Row]], run: Mapping[str, Any]) -> str:
    machines = dict.fromkeys(
        in_words(row.record.measured.facts["hardware"]) for found in rows.values() for row in found
    )
    arguments = ", ".join(f"{k}={v}" for k, v in run["model_args"].items()) or "none"
    return (
        f"Measured on: {' | '.join(machines)}. Versions: {in_words(run['versions'])}. Checkpoint: "
        f"{run['checkpoint']}. Model arguments: {arguments}; batch size {run['batch_size']}; "
        f"generation arguments: {run['gen_kwargs'] or 'those of the task'}. Answers, scores and "
        "the full configuration of every cell: cells/*.json."
    )


def _plots(rows: Mapping[str, list[Row]], timing: Mapping[str, Any] | None) -> list[Plot]:
    scored = {t: [r for r in found if r.mean is not None] for t, found in rows.items()}
    scored = {task: found for task, found in scored.items() if len(found) > 1}
    if not scored:
        return []
    plots = [
        Plot(
            "accuracy_tokens.png",
            "Accuracy against visual tokens",
            draw(_panels(scored, lambda row: row.tokens), _TOKENS, budgets=True),
        )
    ]
    times = timing["milliseconds"] if timing else {}
    timed = {t: [r for r in found if r.cell.setting.name in times] for t, found in scored.items()}
    timed = {task: found for task, found in timed.items() if found}
    if timing and timed:
        label = f"time to the first token, ms, batch {timing['batch_size']} (log scale)"
        panels = _panels(timed, lambda row: times[row.cell.setting.name]["median"])
        caption = "Accuracy against time to the first token"
        plots.append(Plot("accuracy_time.png", caption, draw(panels, label, budgets=False)))
    return plots


def _panels(rows: Mapping[str, list[Row]], x: Callable[[Row], float]) -> list[Panel]:
    panels = []
    for task, found in rows.items():
        lines: dict[str, list[Point]] = {}
        base = None
        for row in found:
            assert row.mean is not None
            assert row.interval is not None
            low, high = row.interval
            point = Point(x(row), 100 * row.mean, 100 * low, 100 * high)
            if row.method == BASELINE:
                base = point
            else:
                lines.setdefault(row.method, []).append(point)
        panels.append(Panel(task, lines, base))
    return panels


def _markdown(tables: Sequence[Table], plots: Sequence[Plot], lead: str, footer: str) -> str:
    parts = [f"# {TITLE}", lead, _READING]
    parts += [f"![{plot.caption}]({plot.file})" for plot in plots]
    parts += [table.markdown() for table in tables]
    return "\n\n".join([*parts, footer]) + "\n"
