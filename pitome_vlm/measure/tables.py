"""Tables with captions and notes, and one self-contained HTML page of figures and tables.

The page (`page.html.jinja`) works without a network, on a phone, in light and dark. Tables for a
terminal are rendered by the command line.
"""

from __future__ import annotations

import base64
import functools
import html
import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ..common import markdown_table

_PAGE, _FRAGMENT = "page.html.jinja", "fragment.html.jinja"


@dataclass(frozen=True)
class Figure:
    """An image with a caption and a smaller second line."""

    image: Image.Image
    caption: str
    note: str = ""


@dataclass(frozen=True)
class Cell:
    """A table cell that is right or wrong; shown by a mark and, in HTML, a colour."""

    text: str
    good: bool

    def __str__(self) -> str:
        return f"{'✓' if self.good else '✗'} {self.text}"


@dataclass(frozen=True)
class Table:
    """Rows of text under a heading.

    Attributes:
        caption: the heading.
        columns: column titles.
        rows: one text or `Cell` per column.
        note: what a reader has to know about the numbers.
        numbers: indices of the columns that are aligned to the right.
        starts: indices of rows that begin a new block.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    note: str = ""
    numbers: frozenset[int] = frozenset()
    starts: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        wrong = [row for row in self.rows if len(row) != len(self.columns)]
        if wrong:
            raise ValueError(
                f"every row of table {self.caption!r} must have {len(self.columns)} cells, "
                f"got {len(wrong[0])}"
            )

    def markdown(self) -> str:
        """Heading, table and note as Markdown."""
        parts = [f"## {self.caption}", markdown_table(self.columns, self.rows, self.numbers)]
        # Markdown passes HTML on, so a note must not look like any.
        return "\n\n".join([*parts, *([html.escape(self.note)] if self.note else [])])

    def html(self) -> str:
        """Caption, table and note as an HTML fragment, for a notebook."""
        text: str = template(_FRAGMENT).render(table=self)
        return text


def html_report(
    title: str,
    *,
    lead: str = "",
    figures: Sequence[Figure] = (),
    tables: Sequence[Table] = (),
    footer: str = "",
    figure_width: str = "9.5rem",
) -> str:
    """A page that needs no other file: images inline, no script.

    Args:
        title: heading and window title.
        lead: a paragraph under it.
        figures: images in a row that wraps.
        tables: tables in order; wide ones scroll on their own.
        footer: provenance of the numbers.
        figure_width: least width of a figure, as CSS writes it.
    """
    text: str = template(_PAGE).render(
        title=title,
        lead=lead,
        figures=figures,
        tables=tables,
        footer=footer,
        figure_width=figure_width,
    )
    return text


def percent(value: float, *, signed: bool = False) -> str:
    """A share of one as percent with one decimal, without the sign for percent."""
    if signed:
        return f"{100 * value:+.1f}"
    # What rounds to zero would print a minus sign.
    return f"{0.0 if abs(100 * value) < 0.05 else 100 * value:.1f}"


def percent_text(value: float) -> str:
    """A share of one in percent, "12.3 %"."""
    return f"{percent(value)} %"


def percent_interval(low: float, high: float, *, signed: bool = False) -> str:
    """The ends of an interval of shares of one as "78.2 to 90.1", in percent."""
    return f"{percent(low, signed=signed)} to {percent(high, signed=signed)}"


def flops_text(value: float) -> str:
    """A number of floating point operations with a unit, "1.234 TFLOP"."""
    return _scaled(value, 1000, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP"))


def bytes_text(value: float) -> str:
    """A number of bytes with a unit, "1.234 MiB"."""
    return _scaled(value, 1024, ("B", "KiB", "MiB", "GiB"))


def png(image: Image.Image) -> bytes:
    """An image as the content of a PNG file."""
    data = io.BytesIO()
    image.convert("RGB").save(data, "PNG", optimize=True)
    return data.getvalue()


def _scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    """Four digits, zeros at the end too, so that the numbers of a column line up."""
    if value < base:
        return f"{value:.4g} {units[0]}"
    for unit in units[1:]:
        value /= base
        if value < base or unit == units[-1]:
            break
    return f"{value:#.4g}".rstrip(".") + f" {unit}"


def _base64_png(image: Image.Image) -> str:
    return base64.b64encode(png(image)).decode("ascii")


@functools.cache
def template(name: str, package: str = __package__) -> Any:
    """A Jinja template among the files of a package; what it shows is escaped."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader(package, "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["base64_png"] = _base64_png
    return environment.get_template(name)


def folded(title: str, steps: list[str]) -> list[str]:
    """The title and the steps in lines of at most 79 characters, no step broken in two."""
    # textwrap breaks at spaces, so the spaces within a step are hidden from it.
    text = ", ".join(step.replace(" ", "\0") for step in steps)
    folded = textwrap.wrap(f"{title}: {text}", 79, subsequent_indent="  ", break_long_words=False)
    return [line.replace("\0", " ") for line in folded]
