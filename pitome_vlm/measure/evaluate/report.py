"""From the files of a sweep to the tables of its report.

The tables hold what a reader needs to judge a number: intervals, paired differences and costs.
What others published is in `published.py`, the pages are made by `report_pages.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..stats import Interval, Paired, compare, holm, mean_interval
from ..tables import Table, bytes_text, flops_text, percent, percent_interval
from .records import Folder, Record
from .suites import BASELINE, Cell

# The metric that a task's own table is read by, where it is not the first one.
_PRIMARY = {
    "mme": "mme_perception_score",
    "pope": "pope_f1_score",
    "seedbench": "seed_all",
    "seedbench_lite": "seed_all",
}
_MOST_GROUPS = 16
_FEW_IMAGES = 30


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
    interval: Interval | None = None
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
    images = len(set(rows[0].record.clusters))
    note = f"{len(measured.questions)} questions about {images} images."
    if images < _FEW_IMAGES:
        note += f" With so few images (below {_FEW_IMAGES}) intervals are rough."
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
        parts = [percent(scores[groups == name].mean()) for name in names]
        lines.append([row.method, str(row.tokens), *parts])
    columns = ["method", "tokens", *names]
    counts = ", ".join(f"{name} {(groups == name).sum()}" for name in names)
    return _numeric(f"By type of question: {task}", columns, lines, f"Questions: {counts}.")


def cost_table(rows: Sequence[Row], timing: Mapping[str, Any] | None) -> Table:
    """What every setting computes and stores, and its time to the first token."""
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
                flops_text(facts["tower_flops"]),
                flops_text(facts["prefill_flops"]),
                f"{flops_text(total)}, {100 * total / whole:.0f} %",
                bytes_text(facts["kv_bytes_per_image"]),
                bytes_text(facts["kv_bytes"]),
                _time(time, first),
                f"{time['iqr']:.1f} ms" if time else "-",
            ]
        )
    return _numeric("Costs", columns, lines, _cost_note(rows[0], timing))


def failure_table(failures: Mapping[str, str]) -> Table:
    """The cells without a result, and why."""
    lines = [[name, error] for name, error in failures.items()]
    return Table("Failed, not in the tables below", ["cell", "error"], lines)


def metric_scale(metric: str) -> float:
    """What a metric of lmms-eval is multiplied by: 100 where it is a share of one."""
    return 1.0 if metric.startswith("mme_") or metric == "gpt_eval_score" else 100.0


def _metric_text(row: Row) -> str:
    return f"{row.primary[1] * metric_scale(row.primary[0]):.1f}" if row.primary else "-"


def _own(row: Row) -> str | None:
    """The task's own number as text where it is not the mean over questions."""
    if row.primary is None:
        return None
    name, value = row.primary
    same = row.mean is not None and abs(value * metric_scale(name) - 100 * row.mean) < 1e-6
    return None if same else _metric_text(row)


def _mean_cells(row: Row) -> list[str]:
    if row.mean is None or row.interval is None:
        return ["-", "-"]
    return [percent(row.mean), percent_interval(*row.interval)]


def _paired_cells(row: Row) -> list[str]:
    if row.method == BASELINE:
        return [""] * 5
    paired = row.paired
    if paired is None or row.p_holm is None:
        return ["-"] * 5
    return [
        percent(paired.difference, signed=True),
        percent_interval(paired.low, paired.high, signed=True),
        "-" if paired.lost is None else f"{paired.lost} / {paired.gained}",
        "-" if paired.mcnemar is None else _p(paired.mcnemar),
        _p(row.p_holm),
    ]


def _cost_note(row: Row, timing: Mapping[str, Any] | None) -> str:
    facts = row.record.measured.facts
    note = (
        f"FLOPs and cache are computed for one {_prompt(row)}. "
        "One multiply-add is 2 FLOP, only matrix products and "
        "convolutions count: a layer with n tokens, width C and W weights in its linear maps "
        "takes 2 n W + 4 n² C, plus the comparison of tokens where it merges; all FLOPs "
        "include the projector. Percentages are of the unreduced model. The cache (KV) holds "
        f"{facts['hardware']['dtype']} numbers. "
    )
    if not timing:
        return note + "The time to the first token was not measured."
    return note + (
        f"First token: measured, batch {timing['batch_size']}, first questions of "
        f"{timing['task']}, vision tower, projector and prefill included; median of "
        f"{timing['rounds']} rounds in which the settings took turns, after a warm-up; x is how "
        "many times faster than the unreduced model."
    )


def _prompt(row: Row) -> str:
    """What costs are of; only where all images have as many tokens is the rest known as text."""
    facts = row.record.measured.facts
    thing, size = facts.get("described"), facts.get("image_size")
    text = f"and {facts['text_tokens']} text tokens"
    if thing is None and size is None:
        return f"image {text} (the mean prompt of {row.cell.task})"
    return f"image of {size[1]} x {size[0]} pixels {text}" if size else f"{thing} {text}"


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
    faster = f", {first['median'] / time['median']:.2f}x" if first else ""
    return f"{time['median']:.1f} ms{faster}"


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 600 else f"{value / 60:.1f} min"
