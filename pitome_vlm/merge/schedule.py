"""From a budget to exact token counts.

Everything here is integer arithmetic on the three budget words `keep`, `tokens` and `ratio`. It is
done before anything runs, so that a count can be printed, tested and used to size a prompt without
a model.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Sequence
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
        plain = float(value)
        if name == "tokens":
            if not plain.is_integer() or plain < 1:
                raise ValueError(f"tokens must be a whole number of at least 1, got {value!r}")
            object.__setattr__(self, "tokens", int(plain))
            return
        object.__setattr__(self, name, plain)
        if not 0 < plain <= 1:
            raise ValueError(
                f"{name} must be in (0, 1], got {value!r}; {name}=0.25 keeps a quarter"
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


@dataclass(frozen=True)
class Schedule:
    """What is merged where, known before anything runs.

    Attributes:
        n_tokens: mergeable visual tokens per image before merging (no CLS).
        n_leading: leading tokens that are never merged (CLS), part of every layer's sequence.
        n_layers: layers in the tower.
        used_layers: layers that are run; those after the feature layer are not.
        tower: (layer index, mergeable tokens after it) for every merging layer, in order.
        projector: mergeable tokens after each step on the features the projector reads.
        leading_kept: leading tokens that reach the language model (0 or `n_leading`).
        fewest: mergeable tokens an image keeps at least where every image has its own count;
            `tokens_out` is then the most. None where all have the same.
        packed: all counts are about one tile of several that are packed into one image
            afterwards; what comes out then depends on the image (`counts.count_tokens`).
        typical: the counts are those of a typical image; a tower that takes images of any size
            merges every other one in proportion.
        spread: groups end with the tower, which hands every token's place its group's value.
        after_layer: tokens merge after a layer's MLP and not before it.
    """

    n_tokens: int
    n_leading: int
    n_layers: int
    used_layers: int
    tower: tuple[tuple[int, int], ...] = ()
    projector: tuple[int, ...] = ()
    leading_kept: int = 0
    fewest: int | None = None
    packed: bool = False
    typical: bool = False
    spread: bool = False
    after_layer: bool = False

    @property
    def ladder(self) -> tuple[int, ...]:
        """Mergeable tokens an image may end with where every image has its own count, falling."""
        most = self.tokens_out - self.leading_kept
        return (most,) if self.fewest is None else falling_counts(most, self.fewest)

    @property
    def tokens_in(self) -> int:
        """Visual tokens per image that reach the language model without merging."""
        return self.n_tokens + self.leading_kept

    @property
    def tower_out(self) -> int:
        """Visual tokens per image that leave the tower."""
        counts = [count for _, count in self.tower]
        return (counts[-1] if counts else self.n_tokens) + self.leading_kept

    @property
    def tokens_out(self) -> int:
        """Visual tokens per image that reach the language model with merging."""
        counts = [count for _, count in self.tower] + list(self.projector)
        return (counts[-1] if counts else self.n_tokens) + self.leading_kept

    @property
    def counts_out(self) -> str:
        """`tokens_out` for people: "36", or "9 to 72" where every image has its own count."""
        fewest = self.ladder[-1] + self.leading_kept
        return str(fewest) if self.fewest is None else f"{fewest} to {self.tokens_out}"

    @property
    def is_identity(self) -> bool:
        """True where nothing is merged, so that the untouched code path is taken."""
        return self.tokens_out == self.tokens_in and len(self.ladder) == 1

    def of_image(self, full: int, out: int) -> Schedule:
        """The same for another image than the typical one, in proportion.

        Args:
            full: its tokens before merging.
            out: what it ends with.
        """
        last = self.tokens_out
        tower = tuple((layer, min(full, -(-out * count // last))) for layer, count in self.tower)
        ends = bool(tower) and tower[-1][1] == out
        return dataclasses.replace(
            self, n_tokens=full, tower=tower, projector=() if ends else (out,)
        )

    def depth(self, layer: int) -> float:
        """Relative depth l / L of a layer, or of a step after the tower, in [0, 1]."""
        return min(layer, self.used_layers) / max(1, self.n_layers)

    def layer_lengths(self) -> tuple[int, ...]:
        """Sequence length, leading tokens included, after every layer that is run."""
        after = dict(self.tower)
        current, lengths = self.n_tokens, []
        for layer in range(self.used_layers):
            current = after.get(layer, current)
            lengths.append(current + self.n_leading)
        return tuple(lengths)


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


@dataclass(frozen=True)
class TowerShape:
    """The numbers of a vision tower that a schedule needs.

    Attributes:
        n_tokens: mergeable visual tokens per image (patches).
        n_leading: leading tokens that are never merged (CLS).
        leading_kept: how many of those reach the language model.
        n_layers: layers of the tower.
        used_layers: layers up to the deepest one whose features are read.
        grid: (rows, columns), None where the mergeable tokens are no whole grid.
        packed: an image is several tiles, which are packed into one sequence after the projector.
        projector_only: tokens can be merged after the tower only.
        tower_only: tokens can be merged inside the tower only, because nothing follows that could
            do with fewer.
        typical: see `Schedule`.
        spread: see `Schedule`.
        few: where no layers are named, only `few_layers` merge instead of all that are run
            (`default_layers`).
    """

    n_tokens: int
    n_leading: int
    leading_kept: int
    n_layers: int
    used_layers: int
    grid: tuple[int, int] | None = None
    packed: bool = False
    projector_only: bool = False
    tower_only: bool = False
    typical: bool = False
    spread: bool = False
    few: bool = False


def default_layers(shape: TowerShape, budget: Budget) -> tuple[int, ...] | None:
    """The layers that merge where none are named; None for all that are run.

    Of encoders on their own, all with the paper's `ratio` (which is a fraction per layer), few
    with a total.
    """
    if not shape.few or (shape.tower_only and budget.ratio is not None):
        return None
    return few_layers(shape.used_layers)


def build_schedule(
    shape: TowerShape,
    budget: Budget,
    *,
    stage: str,
    layers: Sequence[int] | None = None,
    tower_share: float = 0.5,
    projector_steps: int | None = None,
    one_step: bool = False,
    pairwise: bool = True,
    fewest: Budget | None = None,
    after_layer: bool = False,
    counts_leading: Callable[[int, float], bool] | None = None,
) -> Schedule:
    """Lay a budget out over tower and projector.

    Args:
        shape: the tower.
        budget: what has to come out; `keep` and `tokens` count all visual tokens that reach the
            language model, a kept CLS included.
        stage: "tower", "projector" or "both".
        layers: tower layers that merge, None for those that the tower says.
        tower_share: see `MergeConfig`.
        projector_steps: see `MergeConfig`.
        one_step: reduce once, at the last merging layer.
        pairwise: one step can at most halve the tokens.
        fewest: smallest budget of an image where every image has its own; `budget` is the largest.
        after_layer: see `Schedule`.
        counts_leading: from a layer and its relative depth to `Algorithm.counts_leading`.

    Raises:
        ValueError: the budget cannot be met, with the smallest or largest value that can.
    """
    if layers is None and not one_step:
        layers = default_layers(shape, budget)
    tower_layers = merging_layers(shape.used_layers, layers) if stage != "projector" else ()
    if one_step:
        tower_layers = tower_layers[-1:]
    n = shape.n_tokens
    if budget.ratio is not None:
        leading = [
            shape.n_leading * counts_leading(layer, layer / max(1, shape.n_layers))
            for layer in tower_layers
            if counts_leading
        ]
        tower = plan_counts(n, len(tower_layers), budget, leading)
        steps = 0 if stage == "tower" else projector_steps or 1
        projector = plan_counts(tower[-1] if tower else n, steps, budget)
    else:
        total = budget.target(n + shape.leading_kept, "tile" if shape.packed else "image")
        assert total is not None
        target = total - shape.leading_kept
        if target < 1:
            raise ValueError(
                f"the budget leaves {total} visual tokens, but the smallest count for this model "
                f"is {1 + shape.leading_kept} (its CLS token reaches the language model)"
            )
        middle = {"tower": target, "projector": n}.get(stage)
        middle = split_target(n, target, tower_share) if middle is None else middle
        tower = geometric_counts(n, len(tower_layers), middle)
        needed = (halving_steps(middle, target) if pairwise else 1) if stage != "tower" else 0
        steps = needed if projector_steps is None else projector_steps
        if stage != "tower" and steps < needed:
            raise ValueError(
                f"projector_steps must be at least {needed} to get from {middle} to {target} "
                f"tokens (one step can at most halve them), got {steps}"
            )
        projector = geometric_counts(middle, steps if stage != "tower" else 0, target)
    before = (n, *tower)
    merging = zip(tower_layers, tower, before, strict=False)
    return Schedule(
        n_tokens=n,
        n_leading=shape.n_leading,
        n_layers=shape.n_layers,
        used_layers=shape.used_layers,
        tower=tuple((layer, after) for layer, after, entering in merging if after < entering),
        projector=projector,
        leading_kept=shape.leading_kept,
        fewest=None if fewest is None else max(1, _total(fewest, shape) - shape.leading_kept),
        packed=shape.packed,
        typical=shape.typical,
        spread=shape.spread,
        after_layer=after_layer,
    )


def _total(budget: Budget, shape: TowerShape) -> int:
    total = budget.target(shape.n_tokens + shape.leading_kept)
    assert total is not None
    return total
