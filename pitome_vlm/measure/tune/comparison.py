"""Merging against smaller images of as many tokens: which is better for the user's questions."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

from ..stats import difference_interval
from .smaller import Smaller


@dataclass(frozen=True)
class Comparison:
    """The setting that was chosen against smaller images, on the check part.

    Attributes:
        how: how images were made smaller, as a phrase.
        tokens: visual tokens per image of smaller images, a mean.
        merged_tokens: the same with merging.
        difference: mean score with merging minus that of smaller images.
        low: lower end of its paired interval, images resampled.
        high: upper end.
        level: coverage of the interval.
        ms: median time to the first token of one question about a smaller image, in milliseconds.
        merged_ms: the same with merging.
    """

    how: str
    tokens: float
    merged_tokens: float
    difference: float
    low: float
    high: float
    level: float
    ms: float
    merged_ms: float

    @property
    def better(self) -> Literal["merging", "smaller", "not_shown"]:
        """What the interval says."""
        if self.low > 0:
            return "merging"
        return "smaller" if self.high < 0 else "not_shown"

    def statement(self, *, answered: bool) -> str:
        """The comparison in one line; with `answered` scores are of right answers."""
        verdict = {
            "merging": "merging is better for this data",
            "smaller": "smaller images are better for this data",
            "not_shown": "neither is shown to be better for this data",
        }[self.better]
        what = "right" if answered else "as the unreduced model does"
        more = "more" if self.difference >= 0 else "fewer"
        return (
            f"Against {self.how} ({self.tokens:.4g} tokens per image, merged "
            f"{self.merged_tokens:.4g}), merging answers {100 * abs(self.difference):.1f} points "
            f"{more} {what} ({100 * self.level:.3g} % interval {100 * self.low:+.1f} to "
            f"{100 * self.high:+.1f}): {verdict}. First token of one question: "
            f"{self.merged_ms:.1f} ms merged, {self.ms:.1f} ms with the smaller image."
        )


def compared(
    smaller: Smaller,
    scores: Sequence[float],
    merged_scores: Sequence[float],
    images: Sequence[Hashable],
    *,
    level: float,
) -> Comparison:
    """The comparison of the same questions' scores; `images` names the image of each."""
    low, high = difference_interval(merged_scores, scores, images, level=level)
    difference = (sum(merged_scores) - sum(scores)) / len(scores)
    return Comparison(
        smaller.how,
        smaller.tokens,
        smaller.merged_tokens,
        difference,
        low,
        high,
        level,
        smaller.ms,
        smaller.merged_ms,
    )
