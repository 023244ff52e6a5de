"""SCOPE (NeurIPS 2025, arXiv 2510.24214): tokens that are attended to and cover the others.

Written from the paper; its code (no licence) was not used.

Followed: a set covers a token as well as its most similar member does, by cosine. The gain of a
token is how much better all tokens are covered once it is in the set; the score is its gain times
its saliency, the attention it gets (from the class token; from all tokens on SigLIP, which has
none), to the power `saliency`. Chosen one by one, the largest score first.
Different: a token that nothing similar was chosen for counts as covered by zero, so that opposite
tokens cover nothing; dropped tokens are counted in the size of their nearest survivor, so that
sizes add up to all patches.

Every choice goes over all pairs, so it is for towers of up to a few thousand tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...common import check_range
from ..algorithm import Algorithm, MergeContext
from ..matching import keep_only
from ..plan import MergePlan
from ..similarity import Similarity


@dataclass(frozen=True)
class ScopeOptions:
    """SCOPE's own option.

    Attributes:
        saliency: exponent of the attention in the score (the paper's alpha, 1 for LLaVA-1.5); 0
            chooses by coverage alone.
    """

    saliency: float = 1.0

    def __post_init__(self) -> None:
        check_range("saliency", self.saliency, 0, 10)


def plan(keys: Tensor, n_out: int, *, ctx: MergeContext) -> MergePlan:
    """Keep `n_out`, 1..N, tokens of the largest score; `ctx` must carry the attention."""
    similarity = Similarity(keys, ctx.pairs)
    power = ctx.own(ScopeOptions).saliency
    worth = ctx.required_attention().to(torch.promote_types(keys.dtype, torch.float32))
    # In units of the largest, so that a high power of a small share is not rounded to zero.
    worth = (worth / worth.amax(-1, keepdim=True)) ** power
    chosen = similarity.most_covering(n_out, worth)
    return keep_only(similarity, chosen)


ALGORITHM = Algorithm(
    name="scope",
    plan=plan,
    source="SCOPE, arXiv 2510.24214, section 3",
    pairwise=False,
    one_step=True,
    needs_attention=True,
    # The paper compares what the tower puts out.
    metric="hidden",
    # One step after the last attention that is run.
    proportional_attention=False,
    options=ScopeOptions,
)
