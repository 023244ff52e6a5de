"""Steps that algorithms share: bipartite soft matching, and choosing tokens far from each other.

Knows: sets of tokens and their similarities. Does not know: how the sets were chosen.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..merge import MergePlan
from ..merge_plan import take_tokens


def take_similarity(similarity: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """[B, N, N] at rows [B, a] and columns [B, b]: [B, a, b]."""
    taken = take_tokens(similarity, rows)
    if len(taken) == 1:
        return taken[0].index_select(1, columns[0])[None]
    return taken.gather(2, columns[:, None, :].expand(-1, rows.shape[1], -1))


def match_most_similar(
    similarity: Tensor, side_a: Tensor, side_b: Tensor, n_merge: int
) -> tuple[Tensor, Tensor]:
    """The `n_merge` tokens of A whose best partner in B is closest, and those partners.

    Args:
        similarity: [B, N, N].
        side_a: [B, a] token indices that may give up their place, a >= n_merge.
        side_b: [B, b] token indices that receive, b >= 1.
        n_merge: r.

    Returns:
        sources [B, r], destinations [B, r]. Ties go to the earlier token.
    """
    best, partner = take_similarity(similarity, side_a, side_b).max(-1)
    chosen = best.argsort(dim=-1, descending=True, stable=True)[:, :n_merge]
    return side_a.gather(1, chosen), side_b.gather(1, partner.gather(1, chosen))


def complement(chosen: Tensor, n_tokens: int) -> Tensor:
    """The tokens that are not chosen [B, k], in raster order: [B, n_tokens - k] int64."""
    taken = torch.zeros(chosen.shape[0], n_tokens, dtype=torch.int64, device=chosen.device)
    order = taken.scatter(1, chosen, 1).argsort(dim=-1, stable=True)
    return order[:, : n_tokens - chosen.shape[1]]


def keep_only(similarity: Tensor, survivors: Tensor, others: Tensor) -> MergePlan:
    """Keep the survivors as they are and drop the others, each booked on its most similar one.

    Args:
        similarity: [B, N, N].
        survivors: [B, m] token indices, m >= 1.
        others: [B, N - m] token indices, all the rest.
    """
    nearest = take_similarity(similarity, others, survivors).argmax(-1)
    return MergePlan.from_pairs(
        similarity.shape[1], others, survivors.gather(1, nearest), prune=True
    )


def farthest_first(distance: Tensor, n_out: int) -> Tensor:
    """Greedy max-min selection, in the order of choice. Ties go to the earlier token.

    Args:
        distance: [B, N, N].
        n_out: 1..N.

    Returns:
        [B, n_out] int64, distinct.
    """
    itself = torch.eye(distance.shape[1], dtype=torch.bool, device=distance.device)
    choice = distance.masked_fill(itself, math.inf).amin(-1).argmax(-1)[:, None]
    to_chosen = torch.full_like(distance[:, 0], math.inf)
    chosen = [choice]
    for _ in range(n_out - 1):
        row = take_tokens(distance, choice)[:, 0]
        # What is chosen stays at minus infinity and is never the farthest again.
        to_chosen = torch.minimum(to_chosen, row).scatter_(1, choice, -math.inf)
        choice = to_chosen.argmax(-1)[:, None]
        chosen.append(choice)
    return torch.cat(chosen, 1)


def match_alternating(similarity: Tensor, n_merge: int, *, offset: int = 0) -> MergePlan:
    """ToMe's matching: every second token in raster order is a possible source.

    Args:
        similarity: [B, N, N].
        n_merge: r.
        offset: number of leading tokens that were cut off; ToMe's parity counts them.
    """
    batch, n_tokens = similarity.shape[:2]
    index = torch.arange(n_tokens, device=similarity.device).expand(batch, n_tokens)
    start = offset % 2
    sources, destinations = match_most_similar(
        similarity, index[:, start::2], index[:, 1 - start :: 2], n_merge
    )
    return MergePlan.from_pairs(n_tokens, sources, destinations)
