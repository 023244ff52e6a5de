"""What is tried: recipes (options without a budget) and budgets (token counts)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ...merge import algorithms
from ...merge.config import MergeConfig

# Fractions of the tokens, close to a constant ratio of 0.71.
KEEPS = (0.75, 0.5, 0.35, 0.25, 0.18, 0.125, 0.09, 0.0625)
# For comparison only.
BASELINES = ("none", "pool", "random")
_BUDGET = ("keep", "tokens", "ratio")


@dataclass(frozen=True)
class Recipe:
    """Merge options without a budget.

    Attributes:
        name: its name in tables; the names of `default_recipes` are read by
            `pitome-vlm tune --algorithms`.
        options: fields of `MergeConfig` other than keep, tokens and ratio.

    Raises:
        ValueError: the options hold a budget.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        given = [word for word in _BUDGET if word in self.options]
        if given:
            raise ValueError(
                f"recipe {self.name!r} must leave the budget to the search, got {given[0]}="
                f"{self.options[given[0]]!r}"
            )

    def config(self, tokens: int) -> MergeConfig:
        """The options with a budget; errors as of `MergeConfig`."""
        return MergeConfig.from_dict({**self.options, "tokens": tokens})


def default_recipes() -> list[Recipe]:
    """The default algorithm, every other registered one, and variants of the default.

    Each variant changes one thing: the metric, the stage, or the calibration. Baselines are left
    out.
    """
    default = algorithms.get(MergeConfig(tokens=1).algorithm)
    others = [name for name in algorithms.available() if name not in (default.name, *BASELINES)]
    recipes = [Recipe(name, {"algorithm": name}) for name in (default.name, *others)]
    variants: list[dict[str, Any]] = [
        {"metric": "hidden" if default.metric == "keys" else "keys"},
        {"stage": "projector" if default.default_stage != "projector" else "tower"},
    ]
    if default.calibrated:
        variants.append({"size_bias": False, "positions": "compact"})
    for options in variants:
        shown = ":".join(f"{key}={_shown(value)}" for key, value in options.items())
        recipes.append(Recipe(f"{default.name}:{shown}", {"algorithm": default.name, **options}))
    return recipes


def token_counts(tokens_in: int, budgets: Sequence[float] | None = None) -> list[int]:
    """Budgets as token counts, largest first, without duplicates and the unreduced count.

    Args:
        tokens_in: visual tokens per image without reduction.
        budgets: whole numbers are counts, fractions in (0, 1] are shares of `tokens_in`; None
            takes `KEEPS`.

    Raises:
        ValueError: a budget out of range, or none that reduces anything.
        TypeError: a budget is no number.
    """
    counts = set()
    for budget in KEEPS if budgets is None else budgets:
        if isinstance(budget, bool) or not isinstance(budget, (int, float)):
            raise TypeError(f"budgets must be numbers, got {budget!r}")
        whole = isinstance(budget, int)
        if budget <= 0 or (whole and budget > tokens_in) or (not whole and budget > 1):
            raise ValueError(
                f"budgets must be token counts in 1..{tokens_in} or fractions in (0, 1], "
                f"got {budget!r}"
            )
        counts.add(int(budget) if whole else max(1, math.floor(budget * tokens_in + 0.5)))
    counts.discard(tokens_in)
    if not counts:
        raise ValueError(
            f"budgets must hold a token count below {tokens_in}, the count without reduction"
        )
    return sorted(counts, reverse=True)


def checked_recipes(recipes: Sequence[Recipe]) -> list[Recipe]:
    """The recipes, once every name is found to be there once and every option valid."""
    if not recipes:
        raise ValueError("recipes must hold at least one recipe")
    names = [recipe.name for recipe in recipes]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"recipe {name!r} is given twice")
    for recipe in recipes:
        try:
            algorithms.get(recipe.config(1).algorithm)
        except (TypeError, ValueError) as error:
            raise type(error)(f"recipe {recipe.name!r}: {error}") from error
    return list(recipes)


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
