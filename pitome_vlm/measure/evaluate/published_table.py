"""The table that shows published numbers next to measured ones."""

from __future__ import annotations

from collections.abc import Sequence

from ..tables import Table
from .published import Published, nearest
from .report import Row, metric_scale
from .suites import BASELINE

# Published numbers are shown where their budget is within this share of a measured one.
_NEAR = 0.2
_MEASURED = "measured here"
_NOTE = (
    "Only numbers of the same checkpoint and protocol can be compared; differences to a "
    "source's own unreduced model travel better than values. A ~ marks a token count that "
    "is inferred or a mean. "
)
_COLUMNS = [
    *("method", "tokens", "metric", "value", "minus its none", "model", "provenance", "source"),
]


def published_table(task: str, rows: Sequence[Row]) -> Table | None:
    """Measured numbers and published ones at budgets nearby, None where nobody published any."""
    found = _found(task, [row.tokens for row in rows if row.method != BASELINE])
    if not found:
        return None
    lines = []
    for metric in dict.fromkeys(p.metric for p in found):
        lines += _measured_lines(rows, metric)
        lines += [_published_line(p, found) for p in found if p.metric == metric]
    protocols = dict.fromkeys(f"{p.source}: {p.protocol}" for p in found)
    return Table(
        f"Published and measured: {task}",
        _COLUMNS,
        lines,
        note=_NOTE + " | ".join(protocols),
        numbers=frozenset({1, 3, 4}),
    )


def _found(task: str, budgets: Sequence[int]) -> list[Published]:
    known = nearest([task])
    near = [p for p in known if _is_near(p, budgets)]
    # A source's unreduced model is only of interest together with one of its reduced ones.
    sources = {(p.model, p.source) for p in near}
    return [p for p in known if p in near or (_is_base(p) and (p.model, p.source) in sources)]


def _measured_lines(rows: Sequence[Row], metric: str) -> list[list[str]]:
    values = [(row, _value(row, metric)) for row in rows]
    base = next((v for row, v in values if row.method == BASELINE and v is not None), None)
    return [
        [
            *(row.method, str(row.tokens), metric, f"{value:.1f}", _minus(value, base)),
            *("this checkpoint", _MEASURED, "this report"),
        ]
        for row, value in values
        if value is not None
    ]


def _is_base(row: Published) -> bool:
    return row.method == BASELINE


def _is_near(row: Published, budgets: Sequence[int]) -> bool:
    if _is_base(row) or row.tokens is None:
        return False
    return any(abs(row.tokens / budget - 1) <= _NEAR for budget in budgets)


def _published_line(row: Published, known: Sequence[Published]) -> list[str]:
    sure = row.tokens_basis in ("stated", "computed")
    base = next(
        (
            other.value
            for other in known
            if _is_base(other)
            and other.model == row.model
            and (other.source, other.metric) == (row.source, row.metric)
        ),
        None,
    )
    tokens = "?" if row.tokens is None else f"{'' if sure else '~'}{row.tokens}"
    minus = "" if _is_base(row) else _minus(row.value, base)
    value = f"{row.value:.1f}"
    names = [row.method, tokens, row.metric]
    return [*names, value, minus, row.model, row.provenance, row.source]


def _minus(value: float, base: float | None) -> str:
    return "-" if base is None else f"{value - base:+.1f}"


def _value(row: Row, metric: str) -> float | None:
    results = row.record.measured.results
    if metric == "mme_total":
        parts = [results.get(f"mme_{part}_score") for part in ("perception", "cognition")]
        known = [part for part in parts if part is not None]
        return sum(known) if len(known) == len(parts) else None
    return None if metric not in results else results[metric] * metric_scale(metric)
