"""Time to the first token: how to time a `generate` call fairly."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..common import whole_number
from .stats import iqr


@dataclass(frozen=True)
class Timing:
    """Wall time of one operation over several runs.

    Attributes:
        median_ms: median in milliseconds.
        iqr_ms: interquartile range in milliseconds; 0 for a single run.
        repeats: number of timed runs.
    """

    median_ms: float
    iqr_ms: float
    repeats: int

    def __str__(self) -> str:
        return f"{self.median_ms:.1f} ms (IQR {self.iqr_ms:.1f}, {self.repeats} runs)"


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """As in `timeit`: a collection takes half as long as a run, and falls on any of them."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def time_prefill(
    model: nn.Module, inputs: Mapping[str, Any], repeats: int = 20, warmup: int = 3
) -> Timing:
    """Wall time from pixels and ids to the first token: what a user waits for.

    Args:
        model: a LLaVA, wrapped or not.
        inputs: a processor's batch, on the model's device.
        repeats: timed runs, >= 1; 20 or more for numbers to publish.
        warmup: untimed runs before them, >= 0.

    Raises:
        TypeError: `repeats` or `warmup` is no whole number.
        ValueError: `repeats` or `warmup` out of range, or no tensor among the inputs.
    """
    whole_number("repeats", repeats, 1)
    whole_number("warmup", warmup, 0)
    device = _device_of(inputs)
    times = [_one_run(model, inputs, device) for _ in range(warmup + repeats)][warmup:]
    return Timing(statistics.median(times), iqr(times), repeats)


def _one_run(model: Any, inputs: Mapping[str, Any], device: torch.device) -> float:
    # Accelerators run asynchronously: both ends of the interval wait for the device.
    synchronize = torch.get_device_module(device).synchronize
    synchronize()
    start = time.perf_counter()
    model.generate(**inputs, max_new_tokens=1, min_new_tokens=1, do_sample=False)
    synchronize()
    return (time.perf_counter() - start) * 1e3


def _device_of(inputs: Mapping[str, Any]) -> torch.device:
    for value in inputs.values():
        if isinstance(value, Tensor):
            return value.device
    raise ValueError(f"inputs must hold tensors from a processor, got keys {sorted(inputs)}")
