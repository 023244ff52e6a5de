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
    from ..measure.provenance import in_words

    for table in report.tables():
        _table(table.caption, table.columns, table.rows)
    write(in_words(report.setup))
    for line in report.footnotes():
        write(f"- {line}")
    write("")
    for sentence in verdict(report):
        write(sentence)


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    console = Console(width=min(WIDTH, out.width) if out.is_terminal else WIDTH, highlight=False)
    table = _laid_out(title, columns, rows, space=1)
    # A measure is never more than the width of the console it is taken on.
    if Console(width=10 * WIDTH).measure(table).maximum > console.width:
        table = _laid_out(title, columns, rows, space=0)
    with console.capture() as shown:
        console.print(table)
    write(shown.get())


def _laid_out(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], *, space: int
) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, space, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(str, row))
    return table
