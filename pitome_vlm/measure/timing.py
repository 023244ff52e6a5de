"""Time to the first token: how to time a `generate` call fairly."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Timing:
    """Wall time of one operation over several runs.

    Attributes:
        median_ms: median in milliseconds.
        iqr_ms: distance of the quartiles in milliseconds; 0 for a single run.
        repeats: runs that were timed.
    """

    median_ms: float
    iqr_ms: float
    repeats: int

    def __str__(self) -> str:
        return f"{self.median_ms:.1f} ms (IQR {self.iqr_ms:.1f}, {self.repeats} runs)"


def time_prefill(
    model: nn.Module, inputs: Mapping[str, Any], repeats: int = 20, warmup: int = 3
) -> Timing:
    """Wall time from pixels and ids to the first token: what a user waits for.

    Args:
        model: a LLaVA, wrapped or not.
        inputs: a processor's batch, on the model's device.
        repeats: timed runs, >= 1; at least 20 for a number that is to be published.
        warmup: runs before them, >= 0.

    Raises:
        ValueError: `repeats` or `warmup` out of range, or no tensor among the inputs.
    """
    for field, value, low in (("repeats", repeats, 1), ("warmup", warmup, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f"{field} must be a whole number >= {low}, got {value!r}")
    device = _device_of(inputs)
    times = [_one_run(model, inputs, device) for _ in range(warmup + repeats)][warmup:]
    first, _, third = statistics.quantiles(times, n=4) if repeats > 1 else (0.0, 0.0, 0.0)
    return Timing(statistics.median(times), third - first, repeats)


def _one_run(model: Any, inputs: Mapping[str, Any], device: torch.device) -> float:
    # Accelerators run behind the host: both ends of the interval wait for the device.
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
