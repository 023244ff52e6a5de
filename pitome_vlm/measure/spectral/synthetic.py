"""Clusters with known labels, and what merging does to them.

Draws tokens for which the assumptions of PiToMe's Theorem 1 can be checked, and merges them step by
step as a tower does. No model is involved.

Assumptions, in the words of the paper: (A1) the cosine within a true cluster tends to one; (A2) a
margin m separates cosines within clusters (>= m) from those across (< m); (A3) the clusters' sizes
are strictly ordered at every step. Sizes and noise are given, the rest is measured and reported
with every result.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...common import whole_number
from ...merge import algorithms
from ...merge.algorithm import MergeContext, cosine_similarity, make_plan
from ...merge.algorithms.pitome import EnergyOptions
from ...merge.config import MergeConfig
from ...merge.plan import MergePlan
from ...merge.steps import Budget, plan_counts
from .graph import composed_groups, lemma1_error, mixed_groups, spectral_change, token_graph

LAYOUTS = ("random", "striped")
RATIO = 0.75
MAX_SIGMA = 10.0


@dataclass(frozen=True)
class Clusters:
    """How to draw tokens: orthogonal unit centres and isotropic Gaussian noise.

    Attributes:
        sizes: tokens of each true cluster, at least two clusters.
        layout: "random" shuffles the tokens. "striped" puts the clusters, in the order given,
            first on all even positions and then on all odd ones: a cluster on one parity only
            cannot find a partner of its own in ToMe's matching, which is the layout the paper's
            Lemma 3 needs.
        sigma: root mean square length of the noise around a centre of length one, in (0, 10]; the
            expected cosine within a cluster is near 1 / (1 + sigma^2).
        dim: D, at least the number of clusters.
    """

    sizes: tuple[int, ...]
    layout: str = "random"
    sigma: float = 0.01
    dim: int = 64

    def __post_init__(self) -> None:
        if len(self.sizes) < 2 or min(self.sizes) < 1:
            raise ValueError(
                f"sizes must be at least two clusters of at least one token each, got {self.sizes}"
            )
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {self.layout!r}")
        if not 0 < self.sigma <= MAX_SIGMA:
            raise ValueError(f"sigma must be in (0, {MAX_SIGMA:g}], got {self.sigma!r}")
        if self.dim < len(self.sizes):
            raise ValueError(
                f"dim must be at least {len(self.sizes)}, one direction per cluster, got {self.dim}"
            )

    def draw(self, seed: int) -> tuple[Tensor, Tensor]:
        """Tokens [N, D] float64 and labels [N] int64; a seed gives all layouts the same ones."""
        generator = torch.Generator().manual_seed(seed)
        labels = torch.repeat_interleave(torch.tensor(self.sizes))
        noise = torch.randn(len(labels), self.dim, generator=generator, dtype=torch.float64)
        centres = torch.eye(len(self.sizes), self.dim, dtype=torch.float64)
        tokens = centres[labels] + self.sigma / math.sqrt(self.dim) * noise
        place = torch.arange(len(labels))
        if self.layout == "random":
            order = torch.randperm(len(labels), generator=generator)
        else:
            order = torch.cat([place[::2], place[1::2]]).argsort()
        return tokens[order], labels[order]


@dataclass(frozen=True)
class Assumptions:
    """Whether the theorem applies to a result.

    Attributes:
        within: smallest cosine within a true cluster (A1: tends to one).
        across: largest cosine between two clusters.
        margins: the margin of eq. 4 at every step.
        step_sizes: tokens of every true cluster before each step, largest first; a merged token
            counts for the cluster most of its tokens came from.
    """

    within: float
    across: float
    margins: tuple[float, ...]
    step_sizes: tuple[tuple[int, ...], ...]

    @property
    def separated(self) -> bool:
        """A2: some margin separates the cosines across from those within."""
        return self.across < self.within

    @property
    def own_margin_separates(self) -> bool:
        """Whether the margin that eq. 4 really uses is such a one, at every step."""
        return all(self.across < margin <= self.within for margin in self.margins)

    @property
    def largest_ratio(self) -> float:
        """The largest N_j / N_i of a cluster and a larger one, over all steps; 1 is a tie.

        Lemma 2 of the paper needs a margin of at least this.
        """
        pairs = (pair for sizes in self.step_sizes for pair in itertools.pairwise(sizes))
        return max(small / large for large, small in pairs if large)

    @property
    def strictly_ordered(self) -> bool:
        """A3: no two clusters of one size, at any step."""
        return self.largest_ratio < 1

    @property
    def hold(self) -> bool:
        """A2 and A3 together."""
        return self.separated and self.strictly_ordered


@dataclass(frozen=True)
class Run:
    """One algorithm on one draw.

    Attributes:
        n_groups: groups that are left of the N tokens.
        distance: SD to the graph before the first step.
        bound: N ||L - L_lifted||_2.
        mixed: fraction of the groups that mix labels.
        lemma1_sum: error of Lemma 1 with sum weights.
        lemma1_average: the same with the paper's average weights.
        assumptions: what was measured about them.
    """

    n_groups: int
    distance: float
    bound: float
    mixed: float
    lemma1_sum: float
    lemma1_average: float
    assumptions: Assumptions


def can_merge(algorithm: str) -> bool:
    """Whether an algorithm decides by tokens alone, so that it can be shown clusters."""
    return not algorithms.get(algorithm).needs_attention


def merge_clusters(
    clusters: Clusters,
    algorithm: str,
    *,
    steps: int = 1,
    ratio: float = RATIO,
    seed: int = 0,
) -> Run:
    """Draw tokens, merge them in `steps` steps and compare the graph before and after.

    Every step compares the (size-weighted) means the one before left, as in a tower without its
    layers; there is no CLS token in front. The partition compared is that of the original tokens.

    Args:
        clusters: what to draw.
        algorithm: a name in the registry.
        steps: merging steps, at least one.
        ratio: fraction kept at every step, in (0, 1].
        seed: of the draw and of whatever the algorithm draws.

    Raises:
        ValueError: unknown algorithm, a value out of range, an algorithm that needs more than
            tokens (see `can_merge`), or one that does not group them.
    """
    if not can_merge(algorithm):
        raise ValueError(
            f"algorithm {algorithm!r} reads the class token's attention, which synthetic clusters "
            "do not have; look at real features instead"
        )
    whole_number("steps", steps, 1)
    options = MergeConfig(ratio=ratio, algorithm=algorithm, seed=seed)
    tokens, labels = clusters.draw(seed)
    plans, margins, step_sizes = _merge(tokens, labels, options, steps)
    assign, n_groups = composed_groups(plans)[0], plans[-1].n_out
    weights = token_graph(tokens)
    change = spectral_change(weights, assign, n_groups)
    within, across = _extreme_cosines(tokens, labels)
    return Run(
        n_groups=n_groups,
        distance=float(change.distance),
        bound=float(change.bound),
        mixed=float(mixed_groups(assign, labels, n_groups)),
        lemma1_sum=float(lemma1_error(weights, assign, n_groups, "sum")),
        lemma1_average=float(lemma1_error(weights, assign, n_groups, "average")),
        assumptions=Assumptions(within, across, margins, step_sizes),
    )


def _merge(
    tokens: Tensor, labels: Tensor, config: MergeConfig, steps: int
) -> tuple[list[MergePlan], tuple[float, ...], tuple[tuple[int, ...], ...]]:
    """The steps, with the margin and the clusters' sizes before each of them."""
    algorithm = algorithms.get(config.algorithm)
    counts: Sequence[int] = plan_counts(len(tokens), steps, Budget(ratio=config.ratio))
    if algorithm.one_step:
        counts = counts[-1:]
    values, sizes = tokens[None], None
    plans: list[MergePlan] = []
    margins, step_sizes = [], []
    for step, n_out in enumerate(counts):
        margins.append(config.own(EnergyOptions).margin_at(step / steps))
        before = plans or [MergePlan.identity(values)]
        assign = composed_groups(before)[0]
        step_sizes.append(_cluster_sizes(assign, labels))
        context = MergeContext(
            config=config,
            layer=step,
            depth=step / steps,
            grid=(1, len(tokens)) if step == 0 else None,
            order=plans[-1].order if plans else None,
        )
        plans.append(make_plan(algorithm, values, n_out, ctx=context, sizes=sizes))
        values, sizes = plans[-1].apply(values, sizes, weighted=config.weighted)
    return plans, tuple(margins), tuple(step_sizes)


def _cluster_sizes(assign: Tensor, labels: Tensor) -> tuple[int, ...]:
    """Current tokens of every true cluster, largest first."""
    n_labels = int(labels.max()) + 1
    members = torch.zeros(int(assign.max()) + 1, n_labels, dtype=torch.int64)
    members.index_put_((assign, labels), torch.ones_like(labels), accumulate=True)
    counts = torch.bincount(members.argmax(-1), minlength=n_labels)
    return tuple(counts.sort(descending=True).values.tolist())


def _extreme_cosines(tokens: Tensor, labels: Tensor) -> tuple[float, float]:
    """Smallest cosine of two tokens of one cluster, largest of two clusters."""
    cosines = cosine_similarity(tokens)
    same = labels[:, None] == labels[None, :]
    # A token's cosine with itself is one, so it never is the smallest.
    return float(cosines[same].min()), float(cosines[~same].max())
