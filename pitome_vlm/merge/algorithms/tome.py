"""ToMe (ICLR 2023, arXiv 2210.09461): merge the most similar pairs, whoever they are.

Written from the paper's description of bipartite soft matching. Unlike PiToMe it does not ask which
tokens carry information.
"""

from __future__ import annotations

from torch import Tensor

from ..algorithm import Algorithm, MergeContext
from ..matching import alternating_pairs, match_alternating
from ..plan import MergePlan
from ..similarity import Similarity


def plan(keys: Tensor, n_out: int, *, ctx: MergeContext) -> MergePlan:
    """The r best edges between alternating tokens; a destination may receive several.

    At most half of the N tokens can go: n_out = N - r with 2 r <= N, else a ValueError.
    """
    n_tokens = keys.shape[1]
    if 2 * (n_tokens - n_out) > n_tokens:
        raise ValueError(
            f"tome merges at most half of the tokens in one step: n_out must be in "
            f"{(n_tokens + 1) // 2}..{n_tokens}, got {n_out}"
        )
    return match_alternating(Similarity(keys, ctx.pairs), n_tokens - n_out, offset=ctx.n_leading)


ALGORITHM = Algorithm(
    name="tome",
    plan=plan,
    source="ToMe, arXiv 2210.09461, section 3",
    pairs_compared=alternating_pairs,
)
