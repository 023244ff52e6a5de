"""Time to the first token of the methods that the README compares, for one image and for many."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from pitome_vlm.common import markdown_table
from pitome_vlm.demo import load_split
from pitome_vlm.measure.demo_benchmark import Setting, first_token_times

BATCHES = (1, 8)
ROUNDS = 30
# What the rows call the fields of `FirstToken`.
WALL, PROCESSOR = CLOCKS = ("first_token", "processor")

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
        One row per setting and batch: "method", "tokens", "batch", "hardware", and median and
        interquartile range by the clock ("first_token_ms", "first_token_iqr_ms") and of processor
        time ("processor_ms", "processor_iqr_ms").
    """
    rows = []
    for size in BATCHES:
        samples = load_split(split, size)
        compared = [setting for _, setting in settings]
        times = first_token_times(model, processor, compared, samples, split=split, rounds=ROUNDS)
        for (tokens, setting), measured in zip(settings, times, strict=True):
            row = {"method": setting.name, "tokens": tokens, "batch": size, "hardware": hardware}
            for name, values in zip(CLOCKS, np.transpose(measured), strict=True):
                low, middle, high = np.percentile(values, [25, 50, 75])
                row |= {f"{name}_ms": round(middle, 1), f"{name}_iqr_ms": round(high - low, 1)}
            rows.append(row)
    return rows


def by_name(rows: Sequence[dict[str, Any]]) -> Times:
    """Rows of `time_rows` by method, tokens and batch."""
    return {(row["method"], row["tokens"], row["batch"]): row for row in rows}


def hardware_of(rows: Sequence[dict[str, Any]]) -> str:
    """The machines that rows of `time_rows` come from."""
    return ", ".join(dict.fromkeys(row["hardware"] for row in rows))


def faster(
    times: Times, base: tuple[str, int], row: tuple[str, int], batch: int, clock: str = WALL
) -> str:
    """How many times sooner than `base` the first token of `row` comes; both (method, tokens)."""
    first, own = (times.get((*one, batch), {}).get(f"{clock}_ms") for one in (base, row))
    return "not timed" if first is None or own is None else f"{first / own:.1f}x"


def time_table(rows: Sequence[dict[str, Any]], base: tuple[str, int]) -> list[str]:
    """A section of the report: milliseconds and factors; `base` is (method, tokens) of no merging.

    Returns:
        Lines of Markdown, none where nothing was timed.
    """
    times = by_name(rows)
    sizes = sorted({batch for _, _, batch in times})
    clocks = [name for name in CLOCKS if any(f"{name}_ms" in row for row in rows)]
    lines = []
    for method, tokens in dict.fromkeys((method, tokens) for method, tokens, _ in times):
        cells = [str(tokens), method]
        for size, clock in itertools.product(sizes, clocks):
            row = times.get((method, tokens, size), {})
            factor = faster(times, base, (method, tokens), size, clock)
            cells.append(_milliseconds(row, clock, factor))
        lines.append(cells)
    if not lines:
        return []
    heads = {WALL: "batch {}", PROCESSOR: "batch {}, processor time"}
    shown = [heads[clock].format(size) for size, clock in itertools.product(sizes, clocks)]
    columns = ["visual tokens", "method", *shown]
    processor = "Processor time is that of the one thread. " if PROCESSOR in clocks else ""
    note = (
        f"Milliseconds from pixels to the first token, median of {ROUNDS} interleaved rounds after "
        "a warm-up, with interquartile range; in brackets how many times sooner than no merging. "
        "Tower, projector and prefill are included, Python's garbage collector is off. "
        f"{processor}Hardware: {hardware_of(rows)}."
    )
    return ["## First token", "", markdown_table(columns, lines), "", note, ""]


def _milliseconds(row: dict[str, Any], clock: str, factor: str) -> str:
    if f"{clock}_ms" not in row:
        return "not timed"
    return f"{row[f'{clock}_ms']:.0f} ms, IQR {row[f'{clock}_iqr_ms']:.0f} ({factor})"
