"""pitome_plus: PiToMe's energy and ToMe's choice of edges, joined (ours, issue 4).

Knows: keys and options. Does not know: what the keys were computed from, nor how the plan is
applied.

PiToMe merges all of its 2k redundant tokens pairwise, however different the partners are, because
it has no floor on similarity; ToMe takes the most similar pairs, wherever they are, and so merges
one object with its twin. Here every edge between the two halves is scored by how similar its ends
are *and* how redundant they are,

    score(a, b) = cos(a, b) + (E(a) + E(b)) / 2,

and the r best edges are merged: a pair of twins on an empty background loses against two patches
of that background. Nothing is protected beforehand; isolated tokens have no good edge.

Chosen on the demo model's validation split (eval/results/ablation): energy of both ends against
none, of the source alone, other weights, protection and raster-order halves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..merge import Algorithm, MergeContext, MergePlan, cosine_similarity
from .matching import take_similarity
from .pitome import energy_score, margin_at


def plan(keys: Tensor, n_out: int, *, ctx: MergeContext) -> MergePlan:
    """The r best edges between tokens that alternate in energy order.

    Args:
        keys: [B, N, D].
        n_out: N - r with 2 r <= N.
        ctx: relative depth, and of the options `energy`, `alpha`, `margin`, `restore_order`.

    Raises:
        ValueError: more than half of the tokens would have to go in one step.
    """
    config, n_tokens = ctx.config, keys.shape[1]
    n_merge = n_tokens - n_out
    if 2 * n_merge > n_tokens:
        raise ValueError(
            "pitome_plus merges at most half of the tokens in one step: n_out must be in "
            f"{(n_tokens + 1) // 2}..{n_tokens}, got {n_out}"
        )
    similarity = cosine_similarity(keys)
    margin = margin_at(ctx.depth) if config.margin is None else config.margin
    energy = energy_score(similarity, margin, form=config.energy, alpha=config.alpha)
    by_energy = energy.argsort(dim=-1, descending=True, stable=True)
    # Alternating, so that both ends of a good edge are rarely on one side.
    side_a, side_b = by_energy[:, ::2], by_energy[:, 1::2]
    edges = take_similarity(similarity, side_a, side_b)
    redundancy = energy.gather(1, side_a)[:, :, None] + energy.gather(1, side_b)[:, None, :]
    best, partner = (edges + redundancy / 2).max(-1)
    chosen = best.argsort(dim=-1, descending=True, stable=True)[:, :n_merge]
    sources = side_a.gather(1, chosen)
    destinations = side_b.gather(1, partner.gather(1, chosen))
    order = None
    if not config.restore_order:
        gone = torch.zeros_like(by_energy, dtype=torch.bool).scatter(1, sources, True)
        stays = ~gone.gather(1, by_energy)
        last = stays.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
        order = by_energy.gather(1, last[:, :n_out])
    return MergePlan.from_pairs(n_tokens, sources, destinations, order=order)


ALGORITHM = Algorithm(
    name="pitome_plus",
    plan=plan,
    source="pitome_vlm issue 4: energy-weighted matching of PiToMe (arXiv 2405.16148) and ToMe",
    metric="hidden",
)
