"""Steps that algorithms share: bipartite soft matching, and dropping all but the survivors.

An algorithm chooses the sets of tokens; `similarity.py` computes how alike they are.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .algorithm import MergeContext
from .plan import MergePlan
from .similarity import Similarity

TokenOrder = Literal["reference", "raster"]


def match_most_similar(
    similarity: Similarity,
    side_a: Tensor,
    side_b: Tensor,
    n_merge: int,
    worth: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The `n_merge` tokens of A whose best partner in B is closest, and those partners.

    Args:
        similarity: of N tokens.
        side_a: [B, a] token indices that may give up their place, a >= n_merge.
        side_b: [B, b] token indices that receive, b >= 1.
        n_merge: r.
        worth: of both sides, [B, a] and [B, b] float; the mean of both ends is added to their
            similarity. None for nothing.

    Returns:
        sources [B, r], destinations [B, r]. Ties go to the earlier token.
    """
    best, partner = similarity.best(side_a, side_b, worth)
    chosen = best.argsort(dim=-1, descending=True, stable=True)[:, :n_merge]
    return side_a.gather(1, chosen), side_b.gather(1, partner.gather(1, chosen))


def complement(chosen: Tensor, n_tokens: int) -> tuple[Tensor, Tensor]:
    """The tokens that are not chosen [B, k] and those that are, both in raster order.

    Returns:
        [B, n_tokens - k] and [B, k], int64.
    """
    taken = torch.zeros(chosen.shape[0], n_tokens, dtype=torch.uint8, device=chosen.device)
    order = taken.scatter(1, chosen, 1).argsort(dim=-1, stable=True)
    n_left = n_tokens - chosen.shape[1]
    return order[:, :n_left], order[:, n_left:]


def without(tokens: Tensor, gone: Tensor) -> Tensor:
    """All tokens [B, N], in any order, less those that go [B, r]: [B, N - r] in the same order."""
    flags = torch.zeros_like(tokens, dtype=torch.int8).scatter(1, gone, 1).gather(1, tokens)
    places = flags.argsort(dim=-1, stable=True)[:, : tokens.shape[1] - gone.shape[1]]
    return tokens.gather(1, places)


def keep_only(similarity: Similarity, survivors: Tensor) -> MergePlan:
    """Keep the survivors as they are; all others only count in the size of the most similar one.

    Args:
        similarity: of N tokens.
        survivors: [B, m] token indices, m >= 1.
    """
    others, staying = complement(survivors, similarity.n_tokens)
    _, nearest = similarity.best(others, survivors)
    receivers = survivors.gather(1, nearest)
    return MergePlan.from_pairs(similarity.n_tokens, others, receivers, staying=staying, prune=True)


def alternating_pairs(n_in: int, n_out: int, ctx: MergeContext) -> int:
    """Pairs that `match_alternating` compares (`Algorithm.pairs_compared`)."""
    del n_out, ctx
    return (n_in // 2) * (n_in - n_in // 2)


def match_alternating(
    similarity: Similarity, n_merge: int, token_order: TokenOrder, *, ctx: MergeContext
) -> MergePlan:
    """ToMe's matching: every second token is a possible source.

    The reference code leaves [unmerged sources, all destinations], and the next layer takes every
    second token of that list. Here the tokens stay in raster order and the list is handed on in
    `MergePlan.order`, unless the language model is to get it too (`restore_order=False`).

    Args:
        similarity: of N tokens.
        n_merge: r, 2 r <= N.
        token_order: "raster" for every second token of the image instead.
        ctx: parity counts its leading tokens, which were cut off.
    """
    reference = token_order == "reference"
    tokens = ctx.order if reference and ctx.order is not None else similarity.tokens()
    start = ctx.n_leading % 2
    side_a, side_b = tokens[:, start::2], tokens[:, 1 - start :: 2]
    sources, destinations = match_most_similar(similarity, side_a, side_b, n_merge)
    if not reference:
        return MergePlan.from_pairs(similarity.n_tokens, sources, destinations)
    left = without(torch.cat([side_a, side_b], 1), sources)
    if not ctx.config.restore_order:
        return MergePlan.from_pairs(similarity.n_tokens, sources, destinations, order=left)
    plan = MergePlan.from_pairs(similarity.n_tokens, sources, destinations)
    return plan.with_order(plan.groups_of(left))
