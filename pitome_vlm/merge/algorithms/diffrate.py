"""DiffRate (ICCV 2023, arXiv 2305.17997): rank by class attention, prune the last, merge the next.

DiffRate learns by gradient how many tokens each layer prunes and merges; without training there are
no such rates. Here half of the tokens that have to go are pruned, those ranked lowest, and the rest
is merged, in every layer.

Followed: importance is the class token's attention, mean over heads; the least important tokens
are dropped, the next ones averaged into the kept token they are most similar to (cosines of the
hidden states, hence `metric="hidden"`); log(size) enters the attention.
Different: a pruned token counts in the size of its most similar survivor (the original forgets it);
means are size-weighted unless `weighted=False`; sizes are counts (the original scales what is added
by the similarity). SigLIP has no class token: there it is the attention received from all tokens.
The PiToMe authors' comparison leaves every second layer at one fixed count; here every merging
layer follows the schedule.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..algorithm import Algorithm, MergeContext, gone_with_kept
from ..plan import MergePlan
from ..similarity import Similarity


def plan(keys: Tensor, n_out: int, *, ctx: MergeContext) -> MergePlan:
    """Keep the `n_out` most important tokens; r = N - n_out go, floor(r / 2) of them unused.

    `ctx` must carry the attention, else a ValueError says so.
    """
    n_tokens = keys.shape[1]
    ranked = ctx.required_attention().argsort(dim=-1, descending=True, stable=True)
    kept, removed = ranked[:, :n_out], ranked[:, n_out:]
    _, partner = Similarity(keys, ctx.pairs).best(removed, kept)
    merged = MergePlan.from_pairs(n_tokens, removed, kept.gather(1, partner))
    pruned = ranked[:, n_tokens - (n_tokens - n_out) // 2 :]
    dropped = torch.zeros(keys.shape[:2], dtype=torch.bool, device=keys.device)
    return dataclasses.replace(merged, dropped=dropped.scatter(1, pruned, True))


ALGORITHM = Algorithm(
    name="diffrate",
    plan=plan,
    source="DiffRate, arXiv 2305.17997, section 3",
    pairwise=False,
    needs_attention=True,
    metric="hidden",
    pairs_compared=gone_with_kept,
)
