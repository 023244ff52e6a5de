"""From the files of a sweep to the tables of its report.

Knows: what a reader needs to judge a number: intervals, paired differences, costs, hardware, and
what others published, each labelled. Does not know: how anything was measured, or Markdown and
HTML (`report_pages.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..visualize import Table
from .published import Published, nearest
from .records import Folder, Record
from .statistics import Paired, compare, holm, mean_interval
from .suites import BASELINE, Cell

# The metric that a task's own table is read by, where it is not the first one.
_PRIMARY = {
    "mme": "mme_perception_score",
    "pope": "pope_f1_score",
    "seedbench": "seed_all",
    "seedbench_lite": "seed_all",
}
_MOST_GROUPS = 16
_FEW_PICTURES = 30
# Published numbers are shown where their budget is within this share of a measured one.
_NEAR = 0.2
MEASURED = "measured here"


@dataclass
class Row:
    """A finished cell with everything computed from it.

    Attributes:
        cell: which one.
        record: what was stored.
        mean: share of questions right, None for a task without scores per question.
        interval: its 95 % interval.
        paired: against the unreduced model on the same questions.
        p_holm: `paired.p` corrected for all comparisons on this task.
    """

    cell: Cell
    record: Record
    mean: float | None = None
    interval: tuple[float, float] | None = None
    paired: Paired | None = None
    p_holm: float | None = None

    @property
    def tokens(self) -> int:
        """Visual tokens per image that reached the language model."""
        return int(self.record.measured.facts["visual_tokens"])

    @property
    def method(self) -> str:
        """The method as the user wrote it."""
        return self.cell.setting.method

    @property
    def primary(self) -> tuple[str, float] | None:
        """The task's own metric and its value."""
        results = self.record.measured.results
        name = _PRIMARY.get(self.cell.task, "exact_match")
        if name not in results:
            name = next(iter(results), "")
        return (name, results[name]) if name else None


def rows_of(cells: Sequence[Cell], folder: Folder) -> dict[str, list[Row]]:
    """The finished cells by task, compared with the task's unreduced one."""
    found: dict[str, list[Row]] = {}
    for cell in cells:
        record = folder.load(cell)
        if record is not None:
            found.setdefault(cell.task, []).append(_row(cell, record))
    for rows in found.values():
        base = next((row for row in rows if row.method == BASELINE), None)
        others = [row for row in rows if row is not base and row.record.scores is not None]
        if base is None or base.record.scores is None:
            continue
        for row in others:
            scores = row.record.scores
            assert scores is not None
            row.paired = compare(scores, base.record.scores, row.record.clusters)
        corrected = holm([row.paired.p for row in others if row.paired])
        for row, p in zip(others, corrected, strict=True):
            row.p_holm = p
    return found


def _row(cell: Cell, record: Record) -> Row:
    scores = record.scores
    if scores is None:
        return Row(cell, record)
    return Row(cell, record, float(scores.mean()), mean_interval(scores, record.clusters))


def accuracy_table(task: str, rows: Sequence[Row]) -> Table:
    """Accuracy of every setting and its difference to the unreduced model."""
    own = any(_own(row) for row in rows)
    columns = ["method", "tokens", "right %", "95 %", "minus none", "95 %"]
    columns += ["lost / gained", "McNemar p", "p (Holm)", "answering"]
    names = {row.primary[0] for row in rows if row.primary}
    if own:
        columns.insert(2, ", ".join(sorted(names)))
    lines: list[list[str]] = []
    for row in rows:
        cells = [row.method, str(row.tokens)]
        if own:
            cells.append(_own(row) or _metric_text(row))
        cells += [*_mean_cells(row), *_paired_cells(row), _seconds(row.record.measured.seconds)]
        lines.append(cells)
    measured = rows[0].record.measured
    pictures = len(set(rows[0].record.clusters))
    note = f"{len(measured.questions)} questions about {pictures} pictures."
    if pictures < _FEW_PICTURES:
        note += f" So few pictures (below {_FEW_PICTURES}) make rough intervals."
    if measured.scores is None:
        note += " The task scores only the whole, so there is nothing to pair."
    return _numeric(f"Accuracy: {task}", columns, lines, note)


def group_table(task: str, rows: Sequence[Row]) -> Table | None:
    """Percent right by type of question, None where a task has none or too many."""
    groups = np.array([question.group for question in rows[0].record.measured.questions])
    names = sorted(set(groups.tolist()))
    if not 2 <= len(names) <= _MOST_GROUPS or rows[0].record.scores is None:
        return None
    lines = []
    for row in rows:
        scores = row.record.scores
        assert scores is not None
        parts = [f"{100 * scores[groups == name].mean():.1f}" for name in names]
        lines.append([row.method, str(row.tokens), *parts])
    columns = ["method", "tokens", *names]
    counts = ", ".join(f"{name} {(groups == name).sum()}" for name in names)
    return _numeric(f"By type of question: {task}", columns, lines, f"Questions: {counts}.")


def cost_table(rows: Sequence[Row], timing: Mapping[str, Any] | None) -> Table:
    """What every setting computes, keeps and takes until the first token."""
    columns = ["method", "tokens", "prompt", "vision tower", "prefill", "all FLOPs"]
    columns += ["KV per image", "KV of prompt", "first token", "IQR"]
    base = next((row for row in rows if row.method == BASELINE), rows[0])
    whole = base.record.measured.facts["total_flops"]
    times: Mapping[str, Any] = timing["milliseconds"] if timing else {}
    first = times.get(base.cell.setting.name)
    lines = []
    for row in rows:
        facts, time = row.record.measured.facts, times.get(row.cell.setting.name)
        total = facts["total_flops"]
        lines.append(
            [
                row.method,
                str(row.tokens),
                str(facts["text_tokens"] + row.tokens),
                _flops(facts["tower_flops"]),
                _flops(facts["prefill_flops"]),
                f"{_flops(total)}, {100 * total / whole:.0f} %",
                _bytes(facts["kv_bytes_per_image"]),
                _bytes(facts["kv_bytes"]),
                _time(time, first),
                f"{time['iqr']:.1f} ms" if time else "-",
            ]
        )
    return _numeric("Costs", columns, lines, _cost_note(rows[0], timing))


def published_table(task: str, rows: Sequence[Row]) -> Table | None:
    """Measured numbers and published ones at budgets nearby, None where nobody published any."""
    budgets = [row.tokens for row in rows if row.method != BASELINE]
    known = nearest([task])
    near = [p for p in known if _is_near(p, budgets)]
    # A source's unreduced model is only of interest beside one of its reduced ones.
    sources = {(p.model, p.source) for p in near}
    found = [p for p in known if p in near or (_is_base(p) and (p.model, p.source) in sources)]
    if not found:
        return None
    lines = []
    for metric in dict.fromkeys(p.metric for p in found):
        values = [(row, _value(row, metric)) for row in rows]
        base = next((v for row, v in values if row.method == BASELINE and v is not None), None)
        for row, value in values:
            if value is not None:
                count = str(row.tokens)
                cells = [row.method, count, metric, f"{value:.1f}", _minus(value, base)]
                lines.append([*cells, "this checkpoint", MEASURED, "this report"])
        lines += [_published_line(p, found) for p in found if p.metric == metric]
    columns = ["method", "tokens", "metric", "value", "minus its none", "model", "provenance"]
    protocols = dict.fromkeys(f"{p.source}: {p.protocol}" for p in found)
    note = (
        "Only numbers of the same checkpoint and protocol can be compared; differences to a "
        "source's own unreduced model travel better than values. A ~ marks a token count that "
        "is inferred or a mean. " + " | ".join(protocols)
    )
    return Table(
        f"Published beside measured: {task}",
        [*columns, "source"],
        lines,
        note=note,
        numbers=frozenset({1, 3, 4}),
    )


def failure_table(failures: Mapping[str, str]) -> Table:
    """Cells that gave no result."""
    lines = [[name, error] for name, error in failures.items()]
    return Table("Failed, not in the tables below", ["cell", "error"], lines)


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
    return None if metric not in results else results[metric] * _scale(metric)


def _scale(metric: str) -> float:
    """100 where lmms-eval reports a share of one."""
    return 1.0 if metric.startswith("mme_") or metric == "gpt_eval_score" else 100.0


def _metric_text(row: Row) -> str:
    return f"{row.primary[1] * _scale(row.primary[0]):.1f}" if row.primary else "-"


def _own(row: Row) -> str | None:
    """The task's own number as text where it is not the mean over questions."""
    if row.primary is None:
        return None
    name, value = row.primary
    same = row.mean is not None and abs(value * _scale(name) - 100 * row.mean) < 1e-6
    return None if same else _metric_text(row)


def _mean_cells(row: Row) -> list[str]:
    if row.mean is None or row.interval is None:
        return ["-", "-"]
    low, high = row.interval
    return [f"{100 * row.mean:.1f}", f"{100 * low:.1f} to {100 * high:.1f}"]


def _paired_cells(row: Row) -> list[str]:
    if row.method == BASELINE:
        return [""] * 5
    paired = row.paired
    if paired is None or row.p_holm is None:
        return ["-"] * 5
    return [
        f"{100 * paired.difference:+.1f}",
        f"{100 * paired.low:+.1f} to {100 * paired.high:+.1f}",
        "-" if paired.lost is None else f"{paired.lost} / {paired.gained}",
        "-" if paired.mcnemar is None else _p(paired.mcnemar),
        _p(row.p_holm),
    ]


def _cost_note(row: Row, timing: Mapping[str, Any] | None) -> str:
    facts = row.record.measured.facts
    note = (
        f"FLOPs and cache are computed for one image and {facts['text_tokens']} text tokens (the "
        f"mean prompt of {row.cell.task}). One multiply-add is 2 FLOP, only matrix products and "
        "convolutions count: a layer with n tokens, width C and W weights in its linear maps "
        "takes 2 n W + 4 n² C, plus the comparison of tokens where it merges; all FLOPs "
        "include the projector. Percentages are of the unreduced model. "
    )
    if not timing:
        return note + "The time to the first token was not measured."
    return note + (
        f"First token: measured, batch {timing['batch_size']}, first questions of "
        f"{timing['task']}, vision tower, projector and prefill included; median of "
        f"{timing['rounds']} rounds in which the settings took turns, after a warm-up."
    )


def _numeric(
    caption: str, columns: Sequence[str], lines: Sequence[Sequence[str]], note: str
) -> Table:
    """A table of numbers, a new block wherever the number of tokens changes."""
    starts = frozenset(i for i in range(1, len(lines)) if lines[i][1] != lines[i - 1][1])
    right = frozenset(range(1, len(columns)))
    return Table(caption, columns, lines, note=note, numbers=right, starts=starts)


def _time(time: Mapping[str, float] | None, first: Mapping[str, float] | None) -> str:
    if time is None:
        return "-"
    share = f", {100 * time['median'] / first['median']:.0f} %" if first else ""
    return f"{time['median']:.1f} ms{share}"


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 600 else f"{value / 60:.1f} min"


def _flops(value: float) -> str:
    units = ("", "k", "M", "G", "T")
    index = max(0, min(len(units) - 1, (len(str(int(value))) - 1) // 3))
    return f"{value / 1000**index:.3g} {units[index]}"


def _bytes(value: float) -> str:
    return f"{value / 1024:.0f} KiB" if value < 1 << 20 else f"{value / (1 << 20):.1f} MiB"
