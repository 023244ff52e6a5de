"""One self-contained HTML page of figures and tables.

Knows: HTML and CSS that work without a network, on a phone, in light and dark. Does not know:
what the figures show or where the numbers come from.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1d20; --soft: #5d626b; --page: #fff; --line: #d9dce1;
  --head: #f3f4f6; --good: #14713a; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e9eb; --soft: #a3a8b1; --page: #16181b;
  --line: #373b42; --head: #212429; --good: #6bd592; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1.5rem 1rem 3rem; color: var(--ink);
  background: var(--page); font: 1rem/1.5 system-ui, "Segoe UI", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .6rem; }
p { margin: .4rem 0 1rem; max-width: 46rem; overflow-wrap: anywhere; }
.note { color: var(--soft); font-size: .9rem; }
.figures { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--figure)), 1fr)); }
figure { margin: 0; }
figure img { display: block; width: 100%; height: auto; border-radius: 4px; }
figcaption { margin-top: .35rem; font-weight: 600; font-size: .9rem; }
figcaption span { display: block; font-weight: 400; color: var(--soft); font-size: .85rem; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: .92rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; text-align: left; border-top: 1px solid var(--line); }
td:not(:first-child) { white-space: nowrap; }
th:first-child { min-width: 9rem; }
thead th { border-top: 0; background: var(--head); font-weight: 600; white-space: nowrap; }
td.number, th.number { text-align: right; }
tr.start td { border-top: 2px solid var(--soft); }
.good { color: var(--good); }
.bad { color: var(--bad); }
"""


@dataclass(frozen=True)
class Figure:
    """A picture with a caption and a smaller second line."""

    image: Image.Image
    caption: str
    note: str = ""


@dataclass(frozen=True)
class Cell:
    """A table cell that is right or wrong; shown by a mark and a colour."""

    text: str
    good: bool


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


def html_report(
    title: str,
    *,
    lead: str = "",
    figures: Sequence[Figure] = (),
    tables: Sequence[Table] = (),
    footer: str = "",
    figure_width: str = "9.5rem",
) -> str:
    """A page that needs no other file: pictures inline, no script.

    Args:
        title: heading and window title.
        lead: a paragraph under it.
        figures: pictures in a row that wraps.
        tables: tables in order; wide ones scroll on their own.
        footer: provenance of the numbers.
        figure_width: least width of a figure, as CSS writes it.
    """
    title = html.escape(title)
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        # Nothing may be fetched, whatever a caption contains.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">",
        f"<title>{title}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{title}</h1>",
        _paragraph(lead),
    ]
    if figures:
        style = html.escape(f"--figure: {figure_width}")
        parts += [
            f'<section class="figures" style="{style}">',
            *map(_figure, figures),
            "</section>",
        ]
    parts += map(_table, tables)
    parts += [_paragraph(footer, "note"), "</body></html>"]
    return "\n".join(part for part in parts if part) + "\n"


def _paragraph(text: str, kind: str = "") -> str:
    attribute = f' class="{kind}"' if kind else ""
    return f"<p{attribute}>{html.escape(text)}</p>" if text else ""


def _figure(figure: Figure) -> str:
    data = io.BytesIO()
    figure.image.convert("RGB").save(data, "PNG", optimize=True)
    source = base64.b64encode(data.getvalue()).decode("ascii")
    caption = html.escape(figure.caption)
    note = f"<span>{html.escape(figure.note)}</span>" if figure.note else ""
    size = f'width="{figure.image.width}" height="{figure.image.height}"'
    return (
        f'<figure><img src="data:image/png;base64,{source}" alt="{caption}" {size}>'
        f"<figcaption>{caption}{note}</figcaption></figure>"
    )


def _table(table: Table) -> str:
    def kind(column: int) -> str:
        return ' class="number"' if column in table.numbers else ""

    head = "".join(
        f'<th scope="col"{kind(i)}>{html.escape(name)}</th>' for i, name in enumerate(table.columns)
    )
    body = []
    for index, row in enumerate(table.rows):
        cells = "".join(f"<td{kind(i)}>{_cell(cell)}</td>" for i, cell in enumerate(row))
        body.append(
            f'<tr class="start">{cells}</tr>' if index in table.starts else f"<tr>{cells}</tr>"
        )
    return "\n".join(
        [
            f"<section><h2>{html.escape(table.caption)}</h2>",
            f'<div class="scroll"><table><thead><tr>{head}</tr></thead>',
            f"<tbody>{''.join(body)}</tbody></table></div>",
            _paragraph(table.note, "note"),
            "</section>",
        ]
    )


def _cell(cell: str | Cell) -> str:
    if isinstance(cell, str):
        return html.escape(cell)
    mark, kind = ("✓", "good") if cell.good else ("✗", "bad")
    return f'<span class="{kind}">{mark} {html.escape(cell.text)}</span>'
