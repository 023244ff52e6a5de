"""VisionZip (CVPR 2025, arXiv 2412.04467): keep what is attended to, merge the rest to context.

Followed: the tokens that get most attention (from the class token; from all tokens on SigLIP,
which has none) are kept as they are ("dominant"). Of the others every so-many-th in raster order
is a target, and each of the rest is averaged into the target with the most similar key
("contextual"). Dominant and contextual stand 54 to 10, the paper's 64 tokens of LLaVA-1.5; its 128
and 192 have the same ratio.
Different: it sits between attention and MLP like every algorithm here (`placement="after_layer"` is
the paper's place); the tokens come out in raster order, not dominant ones first; the class token is
never one of the dominant.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..algorithm import Algorithm, MergeContext
from ..matching import complement, keep_only, match_most_similar
from ..plan import MergePlan
from ..similarity import Similarity

DOMINANT, CONTEXTUAL = 54, 10


def contextual_count(n_out: int) -> int:
    """How many of `n_out` tokens are contextual: the paper's share, one at least of two or more."""
    whole = DOMINANT + CONTEXTUAL
    return min(n_out - 1, max(1, (2 * n_out * CONTEXTUAL + whole) // (2 * whole)))


def pairs_compared(n_in: int, n_out: int, ctx: MergeContext) -> int:
    """Every token that goes with the contextual ones, or with the dominant one if it is alone."""
    del ctx
    return (n_in - n_out) * max(1, contextual_count(n_out))


def plan(keys: Tensor, n_out: int, *, ctx: MergeContext) -> MergePlan:
    """Dominant tokens, and contextual ones made of all others.

    A single token is the dominant one; the rest counts in its size and is dropped. `ctx` must carry
    the attention, else a ValueError says so.
    """
    n_tokens, n_context = keys.shape[1], contextual_count(n_out)
    ranked = ctx.required_attention().argsort(dim=-1, descending=True, stable=True)
    dominant = ranked[:, : n_out - n_context]
    rest, _ = complement(dominant, n_tokens)
    similarity = Similarity(keys, ctx.pairs)
    if n_context == 0:
        return keep_only(similarity, dominant)
    n_rest = rest.shape[1]
    places = torch.arange(n_context, device=keys.device) * n_rest // n_context
    targets = rest[:, places]
    others = rest[:, complement(places[None], n_rest)[0][0]]
    sources, destinations = match_most_similar(similarity, others, targets, others.shape[1])
    return MergePlan.from_pairs(n_tokens, sources, destinations)


ALGORITHM = Algorithm(
    name="visionzip",
    plan=plan,
    source="VisionZip, arXiv 2412.04467, section 3",
    pairwise=False,
    one_step=True,
    needs_attention=True,
    pairs_compared=pairs_compared,
    # One step after the last attention that is run. Telling the language model the sizes gains
    # 4.9 points of relative accuracy at 64 tokens (RESTORE, arXiv 2606.01711), hence calibrated.
    proportional_attention=False,
)
