"""How the result of `pitome-vlm bench` looks at a terminal.

Knows: tables and consoles. Does not know: how anything was timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .terminal import out, write

if TYPE_CHECKING:
    from ..measure.bench import Report

# What tables are laid out for where output is piped or the terminal is wide.
WIDTH = 100


def show(report: Report) -> None:
    """Tables, what they were measured on, formulas, notes, and what it all means."""
    from ..measure.bench import verdict
    from ..measure.bench.report import (
        COLUMN_NOTE,
        FIT_COLUMNS,
        FORMULAS,
        GAIN_COLUMNS,
        TIME_COLUMNS,
        WHOLE_COLUMNS,
        hardware,
    )

    built = " as built" if report.depth != 1 else ""
    _table(
        f"{report.model}{built}: where the time goes, medians in ms (± distance of the quartiles)",
        TIME_COLUMNS,
        report.time_rows(),
    )
    _table(
        f"{report.model}{built}: what it brings (x: times faster than none)",
        GAIN_COLUMNS,
        report.gain_rows(),
    )
    if report.depth != 1:
        _table(
            f"{report.model} at its whole depth, scaled up (ms)",
            WHOLE_COLUMNS,
            report.whole_rows(),
        )
    if report.fits:
        _table(
            "the largest batch" + (" of the whole depth" if report.depth != 1 else ""),
            FIT_COLUMNS,
            report.fit_rows(),
        )
    known = report.setup | hardware()
    write(", ".join(f"{name} {value}" for name, value in known.items()))
    write(f"{report.results[0][0].repeats} rounds in turns")
    for line in (COLUMN_NOTE, FORMULAS, *report.notes):
        write(f"- {line}")
    write("")
    for sentence in verdict(report):
        write(sentence)


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    console = Console(width=min(WIDTH, out.width) if out.is_terminal else WIDTH, highlight=False)
    table = _laid_out(title, columns, rows, space=1)
    # A measure is never more than the width of the console it is taken on.
    if Console(width=10 * WIDTH).measure(table).maximum > console.width:
        table = _laid_out(title, columns, rows, space=0)
    with console.capture() as shown:
        console.print(table)
    write(shown.get())


def _laid_out(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, space: int
) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, space, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table
