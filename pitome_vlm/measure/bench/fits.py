"""The largest batch of a budget, found by trying and timed; `memory.py` does the search."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from .measurement import measure
from .memory import fitting_batch, is_computable, largest_batch, out_of_memory
from .phases import Phases
from .report import Fit

# Few, because a round at the largest batch takes long and adds little.
ROUNDS = 3


def tried_fit(model: Any, result: Phases, memory: int) -> tuple[Fit, Phases | None]:
    """Find the largest batch by trying, and time it; no times where not even one prompt fits.

    Args:
        model: an unwrapped model on a device whose allocator raises when it is full.
        result: the budget, timed at some batch.
        memory: bytes of the device's memory; the search starts at the batch that should fit them.
    """
    known = is_computable(model)
    guess = fitting_batch(model, result, memory, model.dtype) if known else 1
    batch = largest_batch(model, result.budget, result.case, guess=guess)
    while batch:
        case = replace(result.case, batch=batch)
        try:
            (timed,) = measure(model, [result.budget], case, repeats=ROUNDS, warmup=1)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            # A batch that fitted once need not fit again next to what the allocator has kept.
            torch.get_device_module(model.device).empty_cache()
            batch = batch * 15 // 16
            continue
        return Fit(batch, True, timed.answers_per_second(timed.measured), estimated=False), timed
    return Fit(0, True), None
