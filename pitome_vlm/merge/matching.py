"""Steps that algorithms share: bipartite soft matching, and dropping all but the survivors.

An algorithm chooses the sets of tokens; `similarity.py` computes how alike they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .algorithm import MergeContext
from .plan import MergePlan
from .similarity import Similarity


def match_most_similar(
    similarity: Similarity,
    side_a: Tensor,
    side_b: Tensor,
    n_merge: int,
    worth: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The `n_merge` tokens of A whose best partner in B is closest, and those partners.

    Args:
        similarity: of N tokens.
        side_a: [B, a] token indices that may give up their place, a >= n_merge.
        side_b: [B, b] token indices that receive, b >= 1.
        n_merge: r.
        worth: [B, N] float, the mean of both ends is added to their similarity; None for nothing.

    Returns:
        sources [B, r], destinations [B, r]. Ties go to the earlier token.
    """
    best, partner = similarity.best(side_a, side_b, worth)
    chosen = best.argsort(dim=-1, descending=True, stable=True)[:, :n_merge]
    return side_a.gather(1, chosen), side_b.gather(1, partner.gather(1, chosen))


def complement(chosen: Tensor, n_tokens: int) -> Tensor:
    """The tokens that are not chosen [B, k], in raster order: [B, n_tokens - k] int64."""
    taken = torch.zeros(chosen.shape[0], n_tokens, dtype=torch.int64, device=chosen.device)
    order = taken.scatter(1, chosen, 1).argsort(dim=-1, stable=True)
    return order[:, : n_tokens - chosen.shape[1]]


def keep_only(similarity: Similarity, survivors: Tensor, others: Tensor) -> MergePlan:
    """Keep the survivors as they are; the others only count in the size of the most similar one.

    Args:
        similarity: of N tokens.
        survivors: [B, m] token indices, m >= 1.
        others: [B, N - m] token indices, all the rest.
    """
    _, nearest = similarity.best(others, survivors)
    receivers = survivors.gather(1, nearest)
    return MergePlan.from_pairs(similarity.n_tokens, others, receivers, prune=True)


def alternating_pairs(n_in: int, n_out: int, ctx: MergeContext) -> int:
    """Pairs that `match_alternating` compares (`Algorithm.pairs_compared`)."""
    del n_out, ctx
    return (n_in // 2) * (n_in - n_in // 2)


def match_alternating(similarity: Similarity, n_merge: int, *, offset: int = 0) -> MergePlan:
    """ToMe's matching: every second token in raster order is a possible source.

    `offset` is the number of leading tokens that were cut off; ToMe's parity counts them.
    """
    index = similarity.tokens()
    start = offset % 2
    sources, destinations = match_most_similar(
        similarity, index[:, start::2], index[:, 1 - start :: 2], n_merge
    )
    return MergePlan.from_pairs(similarity.n_tokens, sources, destinations)
