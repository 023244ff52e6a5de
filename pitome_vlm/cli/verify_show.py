"""What `pitome-vlm verify` shows in the terminal and writes into its folder.

Knows: the tables and the three files. Does not know: how anything was measured.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich import box
from rich.markup import escape
from rich.table import Table

from ..common import __version__, write_bytes, write_text
from ..measure.machine import processor_name
from ..measure.spectral import plots, report
from ..measure.spectral.study import CaseResult, FeatureRow
from ..measure.spectral.synthetic import RATIO
from .terminal import out, write
from .verify_run import Outcome, Request

# Characters that the first columns of both tables need, and one per algorithm.
LEFT_COLUMNS, COLUMN = 31, 15
REPORT, RESULTS, PLOT = "report.md", "results.json", "spectral.png"


def check_output(folder: Path, *, overwrite: bool, plot: bool) -> None:
    """Refuse before measuring what could not be written afterwards.

    Raises:
        ValueError: the folder is a file.
        FileExistsError: results of an earlier run are there.
        ImportError: matplotlib is needed and not installed.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output must be a folder, but {folder} is a file")
    there = [name for name in (REPORT, RESULTS, PLOT) if (folder / name).exists()]
    if there and not overwrite:
        raise FileExistsError(
            f"{folder} already holds {', '.join(there)}; give another --output, or --overwrite"
        )
    if plot:
        plots.check_matplotlib()


def show(outcome: Outcome) -> None:
    """Tables and statements."""
    if outcome.results:
        for names in _columns(result.algorithm for result in outcome.results):
            out.print(_synthetic_table([r for r in outcome.results if r.algorithm in names]))
        write("† sizes of two clusters tied at some step of some draw (A3 did not hold).")
        least = min(one.sigma for one in outcome.summary)
        for one in outcome.summary:
            if one.sigma == least:
                write(f"- {report.under_line(one)}")
    if outcome.rows:
        for names in _columns(row.algorithm for row in outcome.rows):
            out.print(_feature_table([row for row in outcome.rows if row.algorithm in names]))
        write("blind: groups of the same sizes, members drawn at random.")
    write("")
    for line in [*report.check_lines(outcome.checks), *report.TRUTHS[1:]]:
        write(f"- {line}")


def _columns(names: Iterable[str]) -> list[list[str]]:
    """Algorithms in groups that fit beside each other into the terminal."""
    once = list(dict.fromkeys(names))
    fit = max(1, (out.width - LEFT_COLUMNS) // COLUMN)
    return [once[start : start + fit] for start in range(0, len(once), fit)]


def _synthetic_table(results: Sequence[CaseResult]) -> Table:
    """SD and mixed groups of every case at the smallest noise."""
    least = min(result.sigma for result in results)
    draws = len(results[0].runs)
    table = Table(box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0), pad_edge=False)
    table.title = f"Spectral distance (groups mixed), sigma {least:g}, mean of {draws} draws"
    table.add_column("clusters")
    table.add_column("layout")
    table.add_column("steps", justify="right")
    for name in dict.fromkeys(result.algorithm for result in results):
        table.add_column(escape(name), justify="right")
    last = None
    for case, noise in report.by_case(results).items():
        if last is not None and case.sizes != last:
            table.add_section()
        last = case.sizes
        cells = [_cell(result) for result in noise[least].values()]
        table.add_row(report.sizes_text(case.sizes), case.layout, str(case.steps), *cells)
    return table


def _cell(result: CaseResult) -> str:
    tied = " " if result.ordered == len(result.runs) else "†"
    return f"{report.number(result.distance)} ({result.mixed:.1%}){tied}"


def _feature_table(rows: Sequence[FeatureRow]) -> Table:
    head, lines = report.feature_lines(rows)
    table = Table(box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0), pad_edge=False)
    pictures = len(rows[0].distance)
    table.title = f"Real features: SD / N ≤ Weyl bound, mean of {pictures} picture(s)"
    for index, name in enumerate(head):
        table.add_column(escape(name), justify="right" if index else "left")
    for line in lines:
        if line[0] == report.WHOLE:
            table.add_section()
        table.add_row(*line)
    return table


def provenance(request: Request, outcome: Outcome) -> dict[str, Any]:
    """What a reader needs to judge or repeat the numbers."""
    facts: dict[str, Any] = {"algorithms": ", ".join(request.algorithms)}
    if outcome.results:
        sigmas = ", ".join(f"{sigma:g}" for sigma in request.sigmas)
        facts["synthetic"] = (
            f"seeds 0..{request.seeds - 1}, {RATIO:.0%} kept at every step, sigma {sigmas}"
        )
    return {
        **facts,
        **outcome.facts,
        "hardware": processor_name(),
        "threads": 1,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "pitome_vlm": __version__,
    }


def store(request: Request, outcome: Outcome, folder: Path, *, plot: bool) -> None:
    """Write the files; each is there whole or not at all."""
    facts = provenance(request, outcome)
    picture = plots.draw(outcome.results, outcome.rows) if plot else None
    text = report.markdown(
        outcome.results,
        outcome.rows,
        checks=outcome.checks,
        summary=outcome.summary,
        facts=facts,
        plot=PLOT if plot else None,
    )
    values = {
        "provenance": facts,
        "checks": vars(outcome.checks) | {"passed": outcome.checks.passed},
        "under_assumptions": [vars(one) for one in outcome.summary],
        "synthetic": [result.to_dict() for result in outcome.results],
        "features": [row.to_dict() for row in outcome.rows],
    }
    write_text(folder / RESULTS, _dump(values))
    write_text(folder / REPORT, text)
    if picture is None:
        # A plot of an earlier run would contradict the numbers beside it.
        (folder / PLOT).unlink(missing_ok=True)
    else:
        write_bytes(folder / PLOT, picture)
    for name in (REPORT, RESULTS, *([PLOT] if plot else [])):
        write(f"wrote {folder / name}")


def _dump(values: dict[str, Any]) -> str:
    """JSON with one line per row: readable, and small changes stay small in a diff."""
    parts = []
    for name, value in values.items():
        if isinstance(value, list):
            rows = ",\n".join("  " + json.dumps(row) for row in value)
            parts.append(f'"{name}": [\n{rows}\n]' if rows else f'"{name}": []')
        else:
            parts.append(f'"{name}": {json.dumps(value, indent=2)}')
    return "{\n" + ",\n".join(parts) + "\n}\n"
