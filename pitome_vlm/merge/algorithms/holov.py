"""HoloV (NeurIPS 2025, arXiv 2510.02912): the most attended tokens of every part of the image.

Written from the steps of its released code (Apache-2.0), no line of which was copied.

Followed: the tokens are cut into `crops` runs of raster order of nearly equal size, the first ones
a token longer; a crop's share of the budget is its share of the mean attention (from the class
token; from all tokens on SigLIP, which has none), rounded down, and the crops of the largest shares
get one token more until the budget is spent; in a crop those with the most attention stay.
Different: the released score of a crop adds 0.09 times the variance of its tokens' cosines, scaled
to the mean attention of that same crop. In the mean over the crop that is the same factor for all,
so it moves no quota and is not computed. What a crop is too small for goes to the most attended of
the other tokens (the code pads with zeros). Dropped tokens are counted in the size of their nearest
survivor, so that sizes add up to all patches; survivors come out in raster order. The paper's
second part, which shows dropped tokens to the language model again, is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...common import whole_number
from ..algorithm import Algorithm, MergeContext, gone_with_kept
from ..matching import keep_only
from ..plan import MergePlan
from ..similarity import Similarity


@dataclass(frozen=True)
class HoloVOptions:
    """HoloV's own option.

    Attributes:
        crops: parts of the image that share the budget; no more than there are tokens are used.
    """

    crops: int = 16

    def __post_init__(self) -> None:
        whole_number("crops", self.crops, 1)


def plan(keys: Tensor, n_out: int, *, ctx: MergeContext) -> MergePlan:
    """Keep `n_out`, 1..N, tokens; `ctx` must carry the attention."""
    attention = ctx.required_attention()
    batch, n_tokens = attention.shape
    n_crops = min(ctx.own(HoloVOptions).crops, n_tokens)
    short, n_long = divmod(n_tokens, n_crops)
    end = n_long * (short + 1)
    place = torch.arange(n_tokens, device=keys.device)
    in_long, in_short = place < end, place - end
    crop = torch.where(in_long, place // (short + 1), n_long + in_short // short)
    within = torch.where(in_long, place % (short + 1), in_short % short)
    means = [
        attention[:, :end].reshape(batch, n_long, short + 1).mean(-1),
        attention[:, end:].reshape(batch, n_crops - n_long, short).mean(-1),
    ]
    quota = _quotas(torch.cat(means, 1), n_out)
    ranked = attention.argsort(dim=-1, descending=True, stable=True)
    # Crop by crop, and in each by attention; a crop has the places here that it has in the image.
    ranked = ranked.gather(1, crop[ranked].argsort(dim=-1, stable=True))
    within_quota = within < quota[:, crop]
    worth = attention.gather(1, ranked).masked_fill(within_quota, float("inf"))
    first = worth.argsort(dim=-1, descending=True, stable=True)[:, :n_out]
    chosen = ranked.gather(1, first)
    return keep_only(Similarity(keys, ctx.pairs), chosen)


def _quotas(means: Tensor, n_out: int) -> Tensor:
    """Tokens of every crop, `n_out` together, from its mean attention: [B, crops] int64."""
    total = means.sum(1, keepdim=True).clamp_min(torch.finfo(means.dtype).tiny)
    shares = means / total
    quota = (shares * n_out).long()
    order = shares.argsort(dim=-1, descending=True, stable=True)
    left = n_out - quota.sum(1, keepdim=True)
    return quota + (order.argsort(dim=-1) < left).long()


ALGORITHM = Algorithm(
    name="holov",
    plan=plan,
    source="HoloV, arXiv 2510.02912, by its released code",
    pairwise=False,
    one_step=True,
    needs_attention=True,
    pairs_compared=gone_with_kept,
    # What the nearest survivor of a dropped token is found by.
    metric="hidden",
    # One step after the last attention that is run.
    proportional_attention=False,
    options=HoloVOptions,
)
