"""Token counts of merging steps, from the three budget words `keep`, `tokens` and `ratio`.

Integer arithmetic on one image or tile; where a model merges is not known here.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Budget:
    """Exactly one of the three budget words.

    Attributes:
        keep: fraction of an image's visual tokens that reach the language model, 0 < keep <= 1.
        tokens: the same as an absolute count per image, >= 1.
        ratio: the paper's r, the fraction kept at *every* merging step, 0 < ratio <= 1.
    """

    keep: float | None = None
    tokens: int | None = None
    ratio: float | None = None

    def __post_init__(self) -> None:
        given: dict[str, Any] = {k: v for k, v in vars(self).items() if v is not None}
        if len(given) != 1:
            shown = ", ".join(f"{k}={v}" for k, v in given.items()) or "none of them"
            raise ValueError(
                f"exactly one of keep, tokens, ratio must be given, got {shown}; for a quarter "
                "of the visual tokens pass keep=0.25"
            )
        (name, value), *_ = given.items()
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__})")
        try:
            plain = float(value)
        except OverflowError:
            plain = math.inf
        if name == "tokens":
            if not plain.is_integer() or plain < 1:
                raise ValueError(f"tokens must be a whole number of at least 1, got {value!r:.60}")
            object.__setattr__(self, "tokens", int(plain))
            return
        object.__setattr__(self, name, plain)
        if not 0 < plain <= 1:
            raise ValueError(
                f"{name} must be in (0, 1], got {value!r:.60}; {name}=0.25 keeps a quarter"
                + (" at every merging step" if name == "ratio" else "")
            )

    def target(self, n_tokens: int, unit: str = "image") -> int | None:
        """The count that must come out, or None where `ratio` decides step by step.

        Args:
            n_tokens: visual tokens of one image before any merging.
            unit: what they are the tokens of, for the message.

        Raises:
            ValueError: `tokens` is larger than `n_tokens`.
        """
        if self.tokens is not None:
            if self.tokens > n_tokens:
                raise ValueError(
                    f"tokens must be in 1..{n_tokens} (this model makes {n_tokens} visual tokens "
                    f"per {unit}), got {self.tokens}"
                )
            return self.tokens
        if self.keep is not None:
            return max(1, math.floor(self.keep * n_tokens + 0.5))
        return None


def apply_ratio(n_tokens: int, ratio: float) -> int:
    """Tokens left after one step at the paper's r: N - floor(N - N r), never below one."""
    return max(1, n_tokens - math.floor(n_tokens - n_tokens * ratio))


def plan_counts(
    n_tokens: int, n_steps: int, budget: Budget, leading: Sequence[int] = ()
) -> tuple[int, ...]:
    """Token count after every merging step.

    With `ratio` every step keeps that fraction (paper section 3.1: k = N - N r removed). With
    `keep` or `tokens` the constant ratio that leads to the target is solved for, and the last
    step absorbs the rounding, so that the target is hit exactly.

    Args:
        n_tokens: tokens before the first step, >= 1.
        n_steps: merging steps, >= 0.
        budget: what to reach.
        leading: for every step, tokens that `ratio` counts besides and that stay; empty for none.

    Returns:
        `n_steps` counts, never increasing; the last one is what the next module sees.

    Raises:
        ValueError: the budget asks for fewer tokens but there is no step to remove them, or
            `tokens` exceeds `n_tokens`.
    """
    target = budget.target(n_tokens)
    if target is None:
        assert budget.ratio is not None
        counts, left = [], n_tokens
        for more in leading or (0,) * n_steps:
            left = max(1, apply_ratio(left + more, budget.ratio) - more)
            counts.append(left)
        return tuple(counts)
    return geometric_counts(n_tokens, n_steps, target)


def geometric_counts(n_tokens: int, n_steps: int, target: int) -> tuple[int, ...]:
    """Counts of `n_steps` steps of one constant ratio from `n_tokens` to exactly `target`."""
    if target == n_tokens:
        return (n_tokens,) * n_steps
    if n_steps == 0:
        raise ValueError(
            f"{n_tokens} tokens cannot become {target}: no merging step lies before the layer "
            'whose features are read; merge at stage="projector" instead'
        )
    log_ratio = math.log(target / n_tokens) / n_steps
    counts = [
        max(target, math.floor(n_tokens * math.exp(log_ratio * step) + 0.5))
        for step in range(1, n_steps + 1)
    ]
    counts[-1] = target
    return tuple(counts)


def falling_counts(most: int, fewest: int, steps: int = 12) -> tuple[int, ...]:
    """Counts from `most` down to `fewest` in (about) equal ratios, each once."""
    log_ratio = math.log(fewest / most) / steps
    counts = (math.floor(most * math.exp(log_ratio * step) + 0.5) for step in range(steps + 1))
    return tuple(dict.fromkeys(counts))


def halving_steps(n_tokens: int, target: int) -> int:
    """Fewest steps from `n_tokens` to `target` when one step can at most pair tokens up."""
    steps = 0
    while n_tokens > target:
        n_tokens = max(target, (n_tokens + 1) // 2)
        steps += 1
    return steps


def split_target(n_tokens: int, target: int, tower_share: float) -> int:
    """Count between tower and projector when both merge: `tower_share` of the log reduction."""
    middle = math.floor(n_tokens * math.pow(target / n_tokens, tower_share) + 0.5)
    return min(n_tokens, max(target, middle))


def few_layers(n_layers: int) -> tuple[int, ...]:
    """The layers after a quarter and after half of a tower of `n_layers`.

    For towers whose merging costs more than their layers save when it is done in each: the earlier
    half of the reduction saves three quarters of the layers, the later one half of them, and what
    is merged has been through a quarter of the tower at least.
    """
    return tuple(sorted({max(0, n_layers // part - 1) for part in (4, 2)}))


def middle_layers(n_layers: int) -> tuple[int, ...]:
    """The layers after three and after five eighths of a tower of `n_layers`, rounded up."""
    return tuple(sorted({-(-part * n_layers // 8) - 1 for part in (3, 5)}))


def every_other_layer(n_layers: int) -> tuple[int, ...]:
    """The first layer of a tower of `n_layers`, the third, and so on."""
    return tuple(range(0, n_layers, 2))


def merging_layers(used_layers: int, layers: Sequence[int] | None) -> tuple[int, ...]:
    """The tower layers that merge: all that are run, or the given ones among them.

    Raises:
        ValueError: a given layer does not exist among those that are run.
    """
    if layers is None:
        return tuple(range(used_layers))
    if not layers:
        raise ValueError("layers is empty; name at least one layer, or leave it out for all")
    bad = [layer for layer in layers if not 0 <= layer < used_layers]
    if bad:
        raise ValueError(
            f"layers must be in 0..{used_layers - 1} (layers after the one whose features are "
            f"read are not run), got {bad[0]}"
        )
    return tuple(sorted(set(layers)))
