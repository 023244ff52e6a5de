"""Where output goes: results to stdout, everything else to stderr.

Tables, progress bars and long lines are laid out for the terminal they appear in; where output is
piped, nothing is folded and nothing is coloured.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import sys
import textwrap
import warnings
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.progress import Progress

_CHATTER = ("autograd._functions", "backends.cpu.ops")
# What a shell reports for Ctrl-C.
EXIT_INTERRUPTED = 130

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """One line for the person at the terminal, on stderr."""
    err.print(_folded(printable(text), err), markup=False, soft_wrap=True)


def write(text: str, *, end: str = "\n", fold: bool = True) -> None:
    """A result on stdout: as it is in a pipe, folded between words on a terminal.

    Not folded are parts of a line, and what is copied. Control characters are left out.
    """
    shown = _folded(printable(text), out) if fold else printable(text)
    out.print(shown, markup=False, soft_wrap=True, end=end)
    out.file.flush()


def write_json(value: Any) -> None:
    """A JSON value on stdout, and never folded, so that it can be copied and piped."""
    write(json.dumps(value, indent=2), fold=False)


def loading(what: str) -> None:
    """Say what takes the next seconds; on a terminal only, because a log has no one waiting."""
    if err.is_terminal:
        say(f"Loading {what} ...")


@functools.cache
def loading_libraries() -> None:
    """Say once that torch is being loaded, unless it is there already."""
    if "torch" not in sys.modules:
        loading("torch and transformers")


def printable(text: str) -> str:
    """Without control characters: what a model or a file says must not steer the terminal."""
    return "".join(c for c in text if c in "\n\t" or (c >= " " and not "\x7f" <= c <= "\x9f"))


def duration(seconds: float) -> str:
    """Seconds as people say them: "75 s", "12 min"."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def one_line(text: str) -> str:
    """A message with its line breaks and runs of spaces removed."""
    return " ".join(text.split())


def _folded(text: str, console: Console) -> str:
    """Lines of at most the terminal's width, broken between words only."""
    if not console.is_terminal:
        return text
    lines: list[str] = []
    for line in text.split("\n"):
        if len(line) <= console.width:
            lines.append(line)
            continue
        indent = line[: len(line) - len(line.lstrip(" -"))]
        lines += textwrap.wrap(
            line,
            console.width,
            subsequent_indent=" " * len(indent),
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join(lines)


def show_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str | Text]],
    *,
    starts: Collection[int] = (),
    names: int = 1,
    left: Collection[int] = (0,),
    folds: tuple[int, int] | None = None,
) -> None:
    """Print a table to stdout.

    Columns that do not fit next to each other follow in further tables, which all begin with the
    columns that name the rows; no cell is cut off or broken inside a word.

    Args:
        title: printed above it.
        columns: heads.
        rows: cells; markup in a `str` is not interpreted.
        starts: numbers of rows that begin a new section.
        names: how many leading columns name the rows.
        left: numbers of the columns that are left-aligned.
        folds: number of a column whose cells may be folded between words, and its least width.
    """
    heads = [Text(head) for head in columns]
    cells = [[c if isinstance(c, Text) else Text(printable(c)) for c in row] for row in rows]
    widths = [
        max(line.cell_len for cell in column for line in cell.split("\n", allow_blank=True))
        for column in zip(heads, *cells, strict=True)
    ]
    groups, gap = _groups(widths, names, folds)
    out.print(Text(_folded(title, out), style="bold"), soft_wrap=True)
    for group in groups:
        # The box adds one space between two columns.
        shown = Table(
            box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, gap - 1, 0, 0)
        )
        for index in group:
            side: Any = "left" if index in left else "right"
            foldable = folds is not None and index == folds[0]
            shown.add_column(heads[index], justify=side, no_wrap=not foldable)
        for number, row in enumerate(cells):
            if number in starts:
                shown.add_section()
            shown.add_row(*(row[index] for index in group))
        natural = sum(widths[index] + gap for index in group)
        console = out if out.is_terminal else Console(file=out.file, width=natural)
        console.print(shown)
        console.print()
    out.file.flush()


def _groups(
    widths: Sequence[int], names: int, folds: tuple[int, int] | None
) -> tuple[list[list[int]], int]:
    """Columns of every table, and the number of spaces between two columns."""
    everything = list(range(len(widths)))
    if not out.is_terminal:
        return [everything], 2
    least = list(widths)
    if folds is not None:
        least[folds[0]] = min(folds[1], widths[folds[0]])
    gaps = [gap for gap in (2, 1) if sum(least) + gap * (len(least) - 1) <= out.width]
    if gaps:
        return [everything], gaps[0]
    groups: list[list[int]] = []
    for index in everything[names:]:
        wanted = [*(groups[-1] if groups else everything[:names]), index]
        if groups and sum(least[i] + 1 for i in wanted) - 1 > out.width:
            groups.append([*everything[:names], index])
        elif groups:
            groups[-1].append(index)
        else:
            groups.append(wanted)
    return groups, 1


def progress_bars() -> Progress:
    """Progress bars on stderr, which vanish when they are done; none without a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )


@contextlib.contextmanager
def quiet(verbose: bool = False) -> Iterator[None]:
    """Keep the libraries' progress bars and log lines out of the terminal, unless `verbose`.

    Says that the libraries are being loaded where they are not yet. Warnings of Python become one
    line each. Everything is put back afterwards.
    """
    loading_libraries()
    if verbose:
        with _chatter(_Once()):
            yield
        return
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        enable_progress_bars,
    )
    from transformers.utils import logging as messages

    level, bars = messages.get_verbosity(), messages.is_progress_bar_enabled()
    downloads = not are_progress_bars_disabled()
    messages.set_verbosity_error()
    messages.disable_progress_bar()
    if downloads and err.is_terminal:
        # transformers silences the hub as well, but a download of minutes has to show.
        enable_progress_bars()
    try:
        with warnings.catch_warnings(), _chatter(lambda record: record.levelno >= logging.ERROR):
            warnings.showwarning = _show_warning  # type: ignore[assignment]
            yield
    finally:
        messages.set_verbosity(level)
        if bars:
            messages.enable_progress_bar()
        elif downloads:
            enable_progress_bars()


class _Once(logging.Filter):
    """Lets every message through once."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        new = text not in self.seen
        self.seen.add(text)
        return new


@contextlib.contextmanager
def _chatter(chosen: Any) -> Iterator[None]:
    """Filter what bitsandbytes says at every matrix product, and of packages for CPUs."""
    loggers = [logging.getLogger(f"bitsandbytes.{name}") for name in _CHATTER]
    for logger in loggers:
        logger.addFilter(chosen)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(chosen)


def _show_warning(message: Any, category: type[Warning], *rest: Any) -> None:
    del rest
    # Deprecations and the like are for developers of the libraries, not for people at a terminal.
    if issubclass(category, UserWarning):
        say(f"warning: {one_line(str(message))}")
