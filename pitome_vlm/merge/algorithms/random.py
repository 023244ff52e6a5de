"""Random selection: the baseline every designed method has to beat.

It drops tokens and does not average them (`MergePlan.prune`): a dropped token only counts in the
size of its most similar survivor, so that source maps and sizes still account for every patch.
"""

from __future__ import annotations

from torch import Tensor

from ..algorithm import Algorithm, MergeContext, gone_with_kept
from ..matching import keep_only
from ..plan import MergePlan
from ..similarity import Similarity


def plan(keys: Tensor, n_out: int, *, ctx: MergeContext) -> MergePlan:
    """Keep `n_out` of N tokens, the same for every image (see `MergeContext.random_order`)."""
    batch, n_tokens = keys.shape[:2]
    order = ctx.random_order(n_tokens, keys.device).expand(batch, n_tokens)
    return keep_only(Similarity(keys, ctx.pairs), order[:, :n_out])


ALGORITHM = Algorithm(
    name="random",
    plan=plan,
    source="uniform random selection",
    pairwise=False,
    default_stage="projector",
    pairs_compared=gone_with_kept,
    proportional_attention=False,
)
