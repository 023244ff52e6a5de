"""pitome_plus: energy-weighted matching in the tower, then coverage at the projector (ours).

PiToMe merges all of its 2k redundant tokens pairwise, however different the partners are, because
it has no floor on similarity; ToMe takes the most similar pairs, wherever they are, and so merges
one object with its twin. In the tower every edge between two halves is scored here by how similar
its ends are *and* how redundant they are,

    score(a, b) = cos(a, b) + (E(a) + E(b)) / 2,

and the r best edges are merged: a pair of twins on an empty background loses against two patches
of that background. Nothing is protected beforehand; isolated tokens have no good edge. In an
encoder on its own nobody counts objects, every place has its group's value back after the last
layer, and twins are what is merged best: there the similarity of keys alone decides, between halves
that alternate in energy order (eval/results/real_tower).

An edge is only good while there is a choice: with half of the tokens to go every token of one half
would have to merge. So at most a quarter of them go at once, and a step that asks for more takes
several rounds, each on the means of the last one. Rounds are worth it, many merging layers are not:
two of them, after three and five eighths of the tower, are level with all (eval/results/ablation,
"tower layers"), so where no layers are named only those merge. That holds while the projector
does its share: with all of the reduction in the tower, every layer merges.

Pairs run out when few tokens are left: at 1/16 of the tokens some layer has to merge what should
stay apart. So the tower does two thirds of the (logarithmic) reduction, and the last third is one
step on finished features: the tokens farthest from each other stay (the greedy max-min selection
of k-center, as in DivPrune, arXiv 2503.02175), and every other one is averaged into its nearest.

Chosen on the demo model's validation split (eval/results/ablation).
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ..algorithm import Algorithm, MergeContext, every_pair
from ..matching import complement, match_most_similar, without
from ..plan import MergePlan
from ..similarity import Similarity
from .pitome import EnergyOptions, energies

# The share of tokens that go in one round.
_AT_ONCE = 1 / 4


def plan(keys: Tensor, n_out: int, *, ctx: MergeContext) -> MergePlan:
    """Matching in the tower, in rounds; coverage at the projector."""
    if ctx.at_projector:
        return coverage(Similarity(keys, ctx.pairs), n_out, one_kernel=ctx.config.compile)
    whole, sizes = None, ctx.sizes
    for left in _rounds(keys.shape[1], n_out):
        found = matching(Similarity(keys, ctx.pairs), left, ctx)
        whole = found if whole is None else whole.then(found)
        if left > n_out:
            keys, sizes = found.apply(keys.detach(), sizes, weighted=ctx.config.weighted)
    return whole or matching(Similarity(keys, ctx.pairs), n_out, ctx)


def _rounds(n_in: int, n_out: int) -> Iterator[int]:
    """How many tokens are left after each round."""
    while n_in > n_out:
        n_in = max(n_out, n_in - max(1, int(n_in * _AT_ONCE)))
        yield n_in


def pairs_compared(n_in: int, n_out: int, ctx: MergeContext) -> int:
    """All pairs, in every round of those that are left."""
    if ctx.at_projector:
        return every_pair(n_in, n_out, ctx)
    starts = [n_in, *_rounds(n_in, n_out)][:-1]
    return sum(every_pair(n, n_out, ctx) for n in starts)


def matching(similarity: Similarity, n_out: int, ctx: MergeContext) -> MergePlan:
    """The r best edges of tokens that alternate in energy order; r = N - n_out <= N / 2."""
    n_tokens = similarity.n_tokens
    energy = energies(similarity, ctx.own(EnergyOptions), ctx.depth)
    energy, by_energy = energy.sort(dim=-1, descending=True, stable=True)
    # Alternating, so that both ends of a good edge are rarely on one side.
    sides, worth = ((one[:, ::2], one[:, 1::2]) for one in (by_energy, energy))
    weights = None if ctx.tower_only else worth
    sources, destinations = match_most_similar(similarity, *sides, n_tokens - n_out, weights)
    order = None
    if not ctx.config.restore_order:
        order = without(by_energy, sources)
    return MergePlan.from_pairs(n_tokens, sources, destinations, order=order)


def coverage(similarity: Similarity, n_out: int, *, one_kernel: bool = False) -> MergePlan:
    """Tokens far from each other stay, every other one joins the most similar of them."""
    centres = similarity.farthest_first(n_out, one_kernel=one_kernel)
    others, staying = complement(centres, similarity.n_tokens)
    _, nearest = similarity.best(others, centres)
    joins = centres.gather(1, nearest)
    return MergePlan.from_pairs(similarity.n_tokens, others, joins, staying=staying)


ALGORITHM = Algorithm(
    name="pitome_plus",
    plan=plan,
    source="ours: energy-weighted matching of PiToMe (arXiv 2405.16148) and ToMe, then k-center "
    "coverage",
    pairwise=False,
    pairs_compared=pairs_compared,
    few_layers=True,
    default_stage="both",
    tower_share=2 / 3,
    metric="hidden",
    encoder_metric="keys",
    options=EnergyOptions,
)
