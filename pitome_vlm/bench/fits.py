"""The largest batch of a budget, tried out and timed.

Knows: that a model out of memory says so, and that rounds at the largest batch take long. Does not
know: how a size is searched for (`memory.py`), or how the result is shown.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .measurement import measure
from .memory import fitting_batch, largest_batch
from .phases import Phases
from .report import Fit

# Rounds at the largest batch, where each one takes long and says little more.
ROUNDS = 3


def tried_fit(model: Any, result: Phases, memory: int) -> tuple[Fit, Phases | None]:
    """Search for the largest batch and time it.

    Args:
        model: an unwrapped model on a device whose allocator raises when it is full.
        result: the budget, timed at some batch.
        memory: bytes of the device, where the search begins.

    Returns:
        The fit, and its times; None where not even one prompt fits.
    """
    guess = fitting_batch(model, result, memory, model.dtype)
    batch = largest_batch(model, result.budget, result.case, guess=guess)
    if not batch:
        return Fit(batch, True), None
    case = replace(result.case, batch=batch)
    (timed,) = measure(model, [result.budget], case, repeats=ROUNDS, warmup=1)
    return Fit(batch, True, timed.answers_per_second(timed.measured), estimated=False), timed
