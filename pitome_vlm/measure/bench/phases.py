"""Times of one budget in one case, and what follows from them.

Knows: medians, quartiles, how a cut language model is scaled up, when merging pays. Does not know:
models or clocks.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..accounting import Costs
from .prompts import Case

if TYPE_CHECKING:
    from .measurement import Budget

# "Worth it" in the break-even answer length: at least this much less time for a whole answer.
WORTH = 0.10
# What is timed in every round, milliseconds (`clock.phases_of`).
TIMES = ("tower", "merge", "projector", "prompt", "prefill", "first", "decode", "answer")
SCALED = ("prefill_layers", "decode_layers")


def median(values: Sequence[float]) -> float:
    """Median, 0 for nothing."""
    return statistics.median(values) if values else 0.0


def iqr(values: Sequence[float]) -> float:
    """Distance of the quartiles, 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    first, _, third = statistics.quantiles(values, n=4)
    return third - first


@dataclass(frozen=True)
class Estimate:
    """What a user waits for, milliseconds.

    Attributes:
        first: pixels and ids to the first token.
        prefill: the part of it in the language model.
        decode: one further token of every prompt of the batch.
    """

    first: float
    prefill: float
    decode: float

    def total(self, answer_tokens: float) -> float:
        """A whole answer."""
        return self.first + (answer_tokens - 1) * self.decode


@dataclass(frozen=True)
class Lengths:
    """Answers for which merging saves at least so much of the whole time, in tokens.

    Attributes:
        least: the shortest.
        most: the longest, None where it saves that however long the answer is.
    """

    least: int
    most: int | None

    def __str__(self) -> str:
        upper = "any" if self.most is None else str(self.most)
        return upper if self.least == 1 else f"from {self.least}"


def break_even(base: Estimate, merged: Estimate, worth: float = WORTH) -> Lengths | None:
    """The answers for which merging saves at least `worth` of the whole time, None for no answer.

    What is saved grows or shrinks by the same amount with every token, so these are all lengths up
    to some one, or all from some one on.
    """
    saved = (1 - worth) * base.first - merged.first
    per_token = (1 - worth) * base.decode - merged.decode
    if saved >= 0:
        return Lengths(1, None if per_token >= 0 else 1 + math.floor(saved / -per_token))
    if per_token <= 0:
        return None
    return Lengths(1 + math.ceil(-saved / per_token), None)


def pays_for(base: Phases, one: Phases, *, measured: bool = False) -> Lengths | None:
    """`break_even` of two budgets timed in the same rounds.

    Where a further token's time differs by less than rounds do, it counts as the same: what is
    noise per token would decide about long answers.

    Args:
        base: what is compared with.
        one: the budget.
        measured: of the model as it was timed, instead of its whole depth.
    """
    own, other = (x.measured if measured else x.whole for x in (one, base))
    if one.decodes_alike(base):
        own = dataclasses.replace(own, decode=other.decode)
    return break_even(other, own)


@dataclass
class Phases:
    """Times of one budget in one case.

    Attributes:
        budget: what was merged.
        case: what was asked.
        tokens: visual tokens per prompt.
        costs: FLOPs and key-value cache by formula, for one prompt.
        rounds: milliseconds by name (`TIMES`, `SCALED`), one entry per round. `tower` and
            `merge` and `projector` and `prompt` and `prefill` add up to `first`. `merge` is
            everything between pixels and visual tokens that is neither tower nor projector: of
            a tiled model the packing as well, which the untouched model does in `prompt`.
        depth: layers of the whole language model over those that were built.
        peak_bytes: highest device memory while answering, weights included; None on a CPU.
    """

    budget: Budget
    case: Case
    tokens: int
    costs: Costs
    rounds: dict[str, list[float]] = field(default_factory=dict)
    depth: float = 1.0
    peak_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in (*TIMES, *SCALED):
            self.rounds.setdefault(name, [])

    @property
    def repeats(self) -> int:
        """Rounds."""
        return len(self.rounds["first"])

    def median(self, name: str) -> float:
        """Of one of the times."""
        return median(self.rounds[name])

    def add(self, times: dict[str, float]) -> None:
        """One more round."""
        for name, value in times.items():
            self.rounds[name].append(value)

    @property
    def measured(self) -> Estimate:
        """Of the model as it was timed."""
        return Estimate(self.median("first"), self.median("prefill"), self.median("decode"))

    @property
    def whole(self) -> Estimate:
        """Of the whole depth: the time inside the layers times `depth`, the rest once."""
        more = (self.depth - 1) * self.median("prefill_layers")
        further = (self.depth - 1) * self.median("decode_layers")
        own = self.measured
        return Estimate(own.first + more, own.prefill + more, own.decode + further)

    def decodes_alike(self, base: Phases) -> bool:
        """Whether the quartiles of what a further token saves, round by round, have 0 in between.

        Args:
            base: the budget to compare with, timed in the same rounds.
        """
        saved = [a - b for a, b in zip(self._decoding, base._decoding, strict=True)]
        if len(saved) < 2:
            return False
        low, _, high = statistics.quantiles(saved, n=4)
        return low <= 0 <= high

    @property
    def _decoding(self) -> list[float]:
        """Milliseconds of one further token at the whole depth, one entry per round."""
        rounds = zip(self.rounds["decode"], self.rounds["decode_layers"], strict=True)
        return [all_of_it + (self.depth - 1) * layers for all_of_it, layers in rounds]

    @property
    def kv_bytes(self) -> int:
        """Key-value cache of the batch behind the prompts, at the whole depth."""
        return round(self.costs.kv_bytes * self.depth) * self.case.batch

    def answers_per_second(self, estimate: Estimate) -> float:
        """Finished answers per second at this batch size."""
        return 1e3 * self.case.batch / estimate.total(self.case.answer_tokens)
