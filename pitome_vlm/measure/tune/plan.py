"""The options of a tuning run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...common import check_range, whole_number
from .recipes import Recipe, checked_recipes
from .scoring import Scorer, exact_match

MOST_CHECKS = 3


@dataclass(frozen=True)
class Plan:
    """Options of `tune`, checked as far as they can be without a model.

    Attributes:
        max_loss: largest loss, in [0, 1), as a share of the unreduced model's accuracy (0.01 is
            1 %); without answers the loss is 1 - agreement with the unreduced model's answers.
        recipes: options to try; None for `default_recipes()`.
        budgets: token counts (whole numbers) or fractions; None for eight from 3/4 to 1/16.
        seed: random seed of the split.
        check_share: share of the images to check on, in (0, 1).
        confidence: coverage of the intervals, in (0.5, 1).
        max_checks: number of settings that may be checked one after the other, 1 to 3; the
            interval of each is wider than the one before.
        scorer: from an answer and the accepted ones to a score in [0, 1].

    Raises:
        TypeError: an option of the wrong type.
        ValueError: an option out of range.
    """

    max_loss: float = 0.01
    recipes: Sequence[Recipe] | None = None
    budgets: Sequence[float] | None = None
    seed: int = 0
    check_share: float = 0.5
    confidence: float = 0.95
    max_checks: int = MOST_CHECKS
    scorer: Scorer = exact_match

    def __post_init__(self) -> None:
        if not 0 <= self.max_loss < 1:
            raise ValueError(
                f"max_loss must be in [0, 1), a share: 0.01 is one percent; got {self.max_loss}"
            )
        check_range("confidence", self.confidence, 0.5, 1, open_ends=True)
        whole_number("max_checks", self.max_checks, 1, MOST_CHECKS)
        if self.recipes is not None:
            checked_recipes(self.recipes)
