"""DivPrune (CVPR 2025, arXiv 2503.02175): the subset whose closest two tokens are farthest apart.

Written from the paper; its code (CC BY-NC) was not used.

Followed: pruning as the max-min diversity problem over cosine distances, solved greedily: first the
token farthest from its own nearest neighbour, then again and again the one farthest from all that
are chosen. No attention is needed.
Different: what the projector reads is compared, not what it gives, because merging takes
place before the projector (which works on every token alone); dropped tokens are counted in the
size of their nearest survivor, so that sizes add up to all patches.
"""

from __future__ import annotations

from torch import Tensor

from ..algorithm import Algorithm, MergeContext
from ..matching import keep_only
from ..plan import MergePlan
from ..similarity import Similarity


def plan(keys: Tensor, n_out: int, *, ctx: MergeContext) -> MergePlan:
    """Keep `n_out`, 1..N, tokens that are far from each other."""
    similarity = Similarity(keys, ctx.pairs)
    chosen = similarity.farthest_first(n_out, one_kernel=ctx.config.compile)
    return keep_only(similarity, chosen)


ALGORITHM = Algorithm(
    name="divprune",
    plan=plan,
    source="DivPrune, arXiv 2503.02175, section 3",
    pairwise=False,
    default_stage="projector",
    # Features are what the paper compares, also where a user puts it into the tower.
    metric="hidden",
    # No tower layer follows by default. Telling the language model the sizes gains 6 points
    # of relative accuracy at 64 tokens (RESTORE, arXiv 2606.01711), hence calibrated.
    proportional_attention=False,
)
