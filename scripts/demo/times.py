"""Time to the first token of the methods that the README compares, for one image and for many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pitome_vlm.common import markdown_table
from pitome_vlm.demo import load_split
from pitome_vlm.measure.demo_benchmark import Setting, first_token_times

BATCHES = (1, 8)
ROUNDS = 30

Times = dict[tuple[str, int, int], dict[str, Any]]


def time_rows(
    model: Any, processor: Any, split: str, settings: Sequence[tuple[int, Setting]], hardware: str
) -> list[dict[str, Any]]:
    """Milliseconds from pixels to the first token, for every setting and size of a batch.

    Args:
        model: the demo model, not wrapped.
        processor: its processor.
        split: where the questions come from.
        settings: (visual tokens, setting) pairs.
        hardware: what the machine is called.

    Returns:
        One row per setting and batch: "method", "tokens", "batch", "first_token_ms" (median),
        "first_token_iqr_ms" and "hardware".
    """
    rows = []
    for size in BATCHES:
        samples = load_split(split, size)
        compared = [setting for _, setting in settings]
        times = first_token_times(model, processor, compared, samples, split=split, rounds=ROUNDS)
        for (tokens, setting), measured in zip(settings, times, strict=True):
            low, middle, high = np.percentile(measured, [25, 50, 75])
            row = {"method": setting.name, "tokens": tokens, "batch": size, "hardware": hardware}
            row |= {"first_token_ms": round(middle, 1), "first_token_iqr_ms": round(high - low, 1)}
            rows.append(row)
    return rows


def by_name(rows: Sequence[dict[str, Any]]) -> Times:
    """Rows of `time_rows` by method, tokens and batch."""
    return {(row["method"], row["tokens"], row["batch"]): row for row in rows}


def hardware_of(rows: Sequence[dict[str, Any]]) -> str:
    """The machines that rows of `time_rows` come from."""
    return ", ".join(dict.fromkeys(row["hardware"] for row in rows))


def faster(times: Times, base: tuple[str, int], row: tuple[str, int], batch: int) -> str:
    """How many times sooner than `base` the first token of `row` comes; both (method, tokens)."""
    if (*base, batch) not in times or (*row, batch) not in times:
        return "not timed"
    ratio = times[(*base, batch)]["first_token_ms"] / times[(*row, batch)]["first_token_ms"]
    return f"{ratio:.1f}x"


def time_table(rows: Sequence[dict[str, Any]], base: tuple[str, int]) -> list[str]:
    """A section of the report: milliseconds and factors; `base` is (method, tokens) of no merging.

    Returns:
        Lines of Markdown, none where nothing was timed.
    """
    times = by_name(rows)
    sizes = sorted({batch for _, _, batch in times})
    lines = []
    for method, tokens in dict.fromkeys((method, tokens) for method, tokens, _ in times):
        cells = [str(tokens), method]
        for size in sizes:
            row = times.get((method, tokens, size))
            factor = faster(times, base, (method, tokens), size)
            cells.append(_milliseconds(row, factor) if row else "not timed")
        lines.append(cells)
    if not lines:
        return []
    columns = ["visual tokens", "method", *(f"batch {size}" for size in sizes)]
    note = (
        f"Milliseconds from pixels to the first token, median of {ROUNDS} interleaved rounds after "
        "a warm-up, with interquartile range; in brackets how many times sooner than no merging. "
        f"Tower, projector and prefill are included. Hardware: {hardware_of(rows)}."
    )
    return ["## First token", "", markdown_table(columns, lines), "", note, ""]


def _milliseconds(row: dict[str, Any], factor: str) -> str:
    return f"{row['first_token_ms']:.0f} ms, IQR {row['first_token_iqr_ms']:.0f} ({factor})"
