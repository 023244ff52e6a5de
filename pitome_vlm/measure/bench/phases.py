"""Times of one budget in one case: medians, scaling to full depth, and when merging pays."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..accounting import Costs
from .prompts import Budget, Case

# Merging pays for an answer where the whole answer takes at least this share less time.
WORTH = 0.10
# Names of the times of every round, in milliseconds (`clock.phases_of`).
TIMES = ("tower", "merge", "projector", "prompt", "prefill", "first", "decode", "answer")
SCALED = ("prefill_layers", "decode_layers")


def median(values: Sequence[float]) -> float:
    """Median, 0 for no values."""
    return statistics.median(values) if values else 0.0


@dataclass(frozen=True)
class Estimate:
    """What a user waits for, in milliseconds.

    Attributes:
        first: from pixels and ids to the first token.
        prefill: the part of `first` that is spent in the language model.
        decode: one further token of every prompt of the batch.
    """

    first: float
    prefill: float
    decode: float

    def total(self, answer_tokens: float) -> float:
        """Milliseconds of a whole answer of so many tokens."""
        return self.first + (answer_tokens - 1) * self.decode


@dataclass(frozen=True)
class Lengths:
    """Lengths of answers, in tokens, for which merging pays; `most` is None for any length."""

    least: int
    most: int | None

    def __str__(self) -> str:
        upper = "any" if self.most is None else str(self.most)
        return upper if self.least == 1 else f"from {self.least}"


def break_even(base: Estimate, merged: Estimate) -> Lengths | None:
    """The answers for which merging saves at least `WORTH` of the whole time; None if for none.

    Every token adds the same amount to what is saved, or takes it away, so merging pays either up
    to some length or from some length on.
    """
    saved = (1 - WORTH) * base.first - merged.first
    per_token = (1 - WORTH) * base.decode - merged.decode
    if saved >= 0:
        return Lengths(1, None if per_token >= 0 else 1 + math.floor(saved / -per_token))
    if per_token <= 0:
        return None
    return Lengths(1 + math.ceil(-saved / per_token), None)


def pays_for(base: Phases, one: Phases, *, measured: bool = False) -> Lengths | None:
    """`break_even` of two budgets timed in the same rounds, at full depth unless `measured`.

    A per-token difference within run-to-run noise counts as none, as it would otherwise decide
    about long answers.
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
        costs: FLOPs and KV cache of one prompt, by formula.
        rounds: milliseconds by name (`TIMES`, `SCALED`), one entry per round. `tower`, `merge`,
            `projector`, `prompt` and `prefill` add up to `first`. `merge` is everything between
            pixels and visual tokens that is neither tower nor projector; in a tiled model that
            includes packing the tiles, which the untouched model does in `prompt`.
        depth: layers of the whole language model divided by those that were built.
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
        """Number of timed rounds."""
        return len(self.rounds["first"])

    def median(self, name: str) -> float:
        """Median milliseconds of one of the times, by name."""
        return median(self.rounds[name])

    def add(self, times: dict[str, float]) -> None:
        """Append the times of one round, in milliseconds by name."""
        for name, value in times.items():
            self.rounds[name].append(value)

    @property
    def measured(self) -> Estimate:
        """Medians of the model as it was timed."""
        return Estimate(self.median("first"), self.median("prefill"), self.median("decode"))

    @property
    def whole(self) -> Estimate:
        """Medians at full depth: time inside the layers times `depth`, the rest once."""
        more = (self.depth - 1) * self.median("prefill_layers")
        further = (self.depth - 1) * self.median("decode_layers")
        own = self.measured
        return Estimate(own.first + more, own.prefill + more, own.decode + further)

    def decodes_alike(self, base: Phases) -> bool:
        """Whether 0 lies between the quartiles of what a further token saves, round by round."""
        saved = [a - b for a, b in zip(self._decoding, base._decoding, strict=True)]
        if len(saved) < 2:
            return False
        low, _, high = statistics.quantiles(saved, n=4)
        return low <= 0 <= high

    @property
    def _decoding(self) -> list[float]:
        """Milliseconds of one further token at full depth, one entry per round."""
        rounds = zip(self.rounds["decode"], self.rounds["decode_layers"], strict=True)
        return [all_of_it + (self.depth - 1) * layers for all_of_it, layers in rounds]

    @property
    def kv_bytes(self) -> int:
        """KV cache of the batch after the prompts, at full depth."""
        return round(self.costs.kv_bytes * self.depth) * self.case.batch

    def answers_per_second(self, estimate: Estimate) -> float:
        """Finished answers per second at this batch size."""
        return 1e3 * self.case.batch / estimate.total(self.case.answer_tokens)
