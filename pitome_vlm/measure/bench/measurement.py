"""A fair comparison of a model with itself: one process, budgets in turns (A B A B), warm-up first.

`clock.py` times the parts of an answer, `phases.py` holds the statistics.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...common import whole_number
from ...wrapping.wrap import is_wrapped, unwrap, wrap
from ..accounting import costs
from .clock import Clock, phases_of, watched
from .phases import Phases
from .prompts import Budget, Case, inputs_for

Progress = Callable[[int, int], None]


class Bench:
    """A model, budgets and a case; an interrupted `run` leaves its whole rounds in `results`.

    Args:
        model: an unwrapped model; unwrapped again whenever `run` ends, error or not.
        budgets: what to compare; the first one is the baseline.
        case: what is asked.
        depth: layers of the whole language model divided by those that `model` has.

    Raises:
        TypeError: not a model that can be asked.
        ValueError: the model is wrapped, or a budget does not fit it.
    """

    def __init__(
        self, model: Any, budgets: Sequence[Budget], case: Case, *, depth: float = 1.0
    ) -> None:
        if is_wrapped(model):
            raise ValueError("bench wraps the model itself; call pitome_vlm.unwrap(model) first")
        if not budgets:
            raise ValueError("bench needs at least one budget")
        self.model, self.case = model, case
        self.inputs = inputs_for(model, case)
        self.results = []
        for budget in budgets:
            with installed(model, budget):
                found = costs(
                    model,
                    text_tokens=case.text_tokens,
                    images=case.images,
                    **case.shown,
                )
            tokens = found.visual_tokens * case.images
            self.results.append(Phases(budget, case, tokens, found, depth=depth))

    def run(self, *, repeats: int = 20, warmup: int = 3, progress: Progress | None = None) -> None:
        """Time rounds and add them to `results`.

        Args:
            repeats: timed rounds, >= 1; 20 or more for numbers to publish.
            warmup: untimed rounds before them, >= 0.
            progress: called with (rounds done, all rounds), warm-up included.

        Raises:
            ValueError: a number out of range; TypeError for one that is not whole.
        """
        whole_number("repeats", repeats, 1)
        whole_number("warmup", warmup, 0)
        for done in range(warmup + repeats):
            times = self._round()
            if done >= warmup:
                # Whole rounds only, so that an interruption leaves every budget as many.
                for result, own in zip(self.results, times, strict=True):
                    result.add(own)
            if progress is not None:
                progress(done + 1, warmup + repeats)

    def warm_up(self, rounds: int = 1, budgets: int | None = None) -> None:
        """Run untimed rounds, of the first `budgets` only where a round takes long."""
        for _ in range(rounds):
            self._round(budgets)

    def _round(self, budgets: int | None = None) -> list[dict[str, float]]:
        times = []
        for result in self.results[:budgets]:
            with installed(self.model, result.budget):
                times.append(timed_answer(self.model, self.inputs, result))
        return times


def measure(
    model: Any,
    budgets: Sequence[Budget],
    case: Case,
    *,
    repeats: int = 20,
    warmup: int = 3,
    depth: float = 1.0,
    progress: Progress | None = None,
) -> list[Phases]:
    """Time a model under several budgets in turns; arguments as in `Bench` and `Bench.run`."""
    bench = Bench(model, budgets, case, depth=depth)
    bench.run(repeats=repeats, warmup=warmup, progress=progress)
    return bench.results


@contextlib.contextmanager
def installed(model: Any, budget: Budget) -> Iterator[None]:
    """Wrap the model with a budget for the `with` block."""
    if budget.config is not None:
        wrap(model, config=budget.config)
    try:
        yield
    finally:
        unwrap(model)


@torch.no_grad()
def timed_answer(model: Any, inputs: dict[str, Tensor], result: Phases) -> dict[str, float]:
    """Milliseconds of one `generate` call under the installed budget, by phase (`phases_of`)."""
    clock = Clock(next(iter(inputs.values())).device)
    memory: Any = torch.get_device_module(clock.device)
    known = hasattr(memory, "reset_peak_memory_stats")
    if known:
        memory.reset_peak_memory_stats(clock.device)
    with watched(model, clock):
        clock.synchronize()
        start = clock.mark()
        answer(model, inputs, result.case.answer_tokens)
        end = clock.mark()
        clock.synchronize()
    if known:
        peak = memory.max_memory_allocated(clock.device)
        result.peak_bytes = max(result.peak_bytes or 0, peak)
    return phases_of(clock, start, end)


def answer(model: Any, inputs: dict[str, Tensor], tokens: int) -> Any:
    """Greedy answers of exactly `tokens` tokens."""
    return model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
