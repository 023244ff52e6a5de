"""What is merged where: a budget laid out over a tower and the steps after it.

It is done before anything runs, so that a count can be printed, tested and used to size a prompt
without a model. The arithmetic of the counts is in `steps.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .steps import (
    Budget,
    falling_counts,
    geometric_counts,
    halving_steps,
    merging_layers,
    middle_layers,
    plan_counts,
    split_target,
)


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
        tower_only: nothing follows the tower that could do with fewer tokens.
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
    tower_only: bool = False

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
    def tower_steps(self) -> tuple[tuple[int, int, int], ...]:
        """(layer, patches before, patches after) of every merging tower layer, without CLS."""
        before = (self.n_tokens, *(count for _, count in self.tower))
        pairs = zip(self.tower, before, strict=False)
        return tuple((layer, entering, leaving) for (layer, leaving), entering in pairs)

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
        usual_layers: those that merge, whatever the algorithm, where none are named; None for what
            the algorithm says (`default_layers`).
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
    usual_layers: tuple[int, ...] | None = None


def default_layers(shape: TowerShape, budget: Budget, few: bool) -> tuple[int, ...] | None:
    """The layers that merge where none are named; None for all that are run.

    Published algorithms merge in every layer of the towers that they were published for, and so
    does whatever `ratio` is given for, the paper's fraction per layer. Earlier layers than
    `middle_layers` save more and lose more (eval/results/ablation, "tower layers").

    Args:
        shape: the tower.
        budget: what has to come out.
        few: the algorithm merges in two layers of any tower (`Algorithm.few_layers`).
    """
    if budget.ratio is not None and (shape.tower_only or shape.usual_layers is None):
        return None
    if shape.usual_layers is None and few:
        return middle_layers(shape.used_layers)
    return shape.usual_layers


def build_schedule(
    shape: TowerShape,
    budget: Budget,
    *,
    stage: str,
    layers: Sequence[int] | None = None,
    tower_share: float = 0.5,
    projector_steps: int | None = None,
    one_step: bool = False,
    few: bool = False,
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
        few: see `default_layers`.
        pairwise: one step can at most halve the tokens.
        fewest: smallest budget of an image where every image has its own; `budget` is the largest.
        after_layer: see `Schedule`.
        counts_leading: from a layer and its relative depth to `Algorithm.counts_leading`.

    Raises:
        ValueError: the budget cannot be met, with the smallest or largest value that can.
    """
    if layers is None and not one_step:
        layers = default_layers(shape, budget, few)
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
        target = _total(budget, shape) - shape.leading_kept
        middle = {"tower": target, "projector": n}.get(stage)
        middle = split_target(n, target, tower_share) if middle is None else middle
        tower = geometric_counts(n, len(tower_layers), middle)
        after = _steps_after(middle, target, projector_steps, pairwise) if stage != "tower" else 0
        projector = geometric_counts(middle, after, target)
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
        fewest=None if fewest is None else _fewest(fewest, shape),
        packed=shape.packed,
        typical=shape.typical,
        spread=shape.spread,
        after_layer=after_layer,
        tower_only=shape.tower_only,
    )


def _total(budget: Budget, shape: TowerShape) -> int:
    """Visual tokens that a budget of `keep` or `tokens` leaves, a kept CLS included."""
    whole = shape.n_tokens + shape.leading_kept
    total = budget.target(whole, "tile" if shape.packed else "image")
    assert total is not None
    if total <= shape.leading_kept:
        raise ValueError(
            f"the budget leaves {total} visual tokens, but the smallest count for this model "
            f"is {1 + shape.leading_kept} (its CLS token reaches the language model)"
        )
    return total


def _fewest(budget: Budget, shape: TowerShape) -> int:
    """Mergeable tokens that the smallest budget of an image leaves, at least one."""
    total = budget.target(shape.n_tokens + shape.leading_kept)
    assert total is not None
    return max(1, total - shape.leading_kept)


def _steps_after(middle: int, target: int, asked: int | None, pairwise: bool) -> int:
    """Steps after the tower that get from `middle` to `target` tokens."""
    needed = halving_steps(middle, target) if pairwise else 1
    if asked is not None and asked < needed:
        raise ValueError(
            f"projector_steps must be at least {needed} to get from {middle} to {target} "
            f"tokens (one step can at most halve them), got {asked}"
        )
    return needed if asked is None else asked
