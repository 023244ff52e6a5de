"""VisPruner (ICCV 2025, arXiv 2412.01818): tokens that are attended to, and diverse others.

Followed: half of the budget goes to the tokens with most attention (from the class token; from all
tokens on SigLIP, which has none). The rest, in order of attention, loses duplicates in rounds:
every second token is compared with the others, and the `ROUND` of them that are most similar to one
of those go, until the other half of the budget is left.
Different: dropped tokens are counted in the size of their nearest survivor, so that sizes add up to
all patches; survivors come out in raster order.
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

# Tokens that go in one round.
ROUND = 8


@dataclass(frozen=True)
class VisPrunerOptions:
    """VisPruner's own option.

    Attributes:
        important: share of the tokens that are left which are chosen by attention.
    """

    important: float = 0.5

    def __post_init__(self) -> None:
        check_range("important", self.important, 0, 1)


def plan(keys: Tensor, n_out: int, *, ctx: MergeContext) -> MergePlan:
    """Keep `n_out`, 1..N, tokens; `ctx` must carry the attention."""
    similarity = Similarity(keys, ctx.pairs)
    ranked = ctx.required_attention().argsort(dim=-1, descending=True, stable=True)
    n_important = int(n_out * ctx.own(VisPrunerOptions).important)
    important, rest = ranked[:, :n_important], ranked[:, n_important:]
    diverse = _without_duplicates(similarity, rest, n_out - n_important)
    chosen = torch.cat([important, diverse], 1)
    return keep_only(similarity, chosen)


def _without_duplicates(similarity: Similarity, rest: Tensor, n_left: int) -> Tensor:
    """`n_left` of the tokens [B, R] that are not like each other: [B, n_left]."""
    if n_left == 0:
        return rest[:, :0]
    while rest.shape[1] > n_left:
        side_a, side_b = rest[:, ::2], rest[:, 1::2]
        n_gone = min(ROUND, rest.shape[1] - n_left, side_a.shape[1])
        alike, _ = similarity.best(side_a, side_b)
        order = alike.argsort(dim=-1, descending=True, stable=True)
        rest = torch.cat([side_a.gather(1, order[:, n_gone:]), side_b], 1)
    return rest


def pairs_compared(n_in: int, n_out: int, ctx: MergeContext) -> int:
    """Half of what is left with the other half in every round; then who goes with who stays."""
    n_left = n_out - int(n_out * ctx.own(VisPrunerOptions).important)
    rest, total = n_in - n_out + n_left, (n_in - n_out) * n_out
    while n_left and rest > n_left:
        total += (rest + 1) // 2 * (rest // 2)
        rest -= min(ROUND, rest - n_left, (rest + 1) // 2)
    return total


ALGORITHM = Algorithm(
    name="vispruner",
    plan=plan,
    source="VisPruner, arXiv 2412.01818, section 4",
    pairwise=False,
    one_step=True,
    needs_attention=True,
    pairs_compared=pairs_compared,
    # The paper compares what the tower puts out.
    metric="hidden",
    # One step after the last attention that is run. Telling the language model the sizes gains
    # 0.9 points of relative accuracy at 64 tokens (RESTORE, arXiv 2606.01711), hence calibrated.
    proportional_attention=False,
    options=VisPrunerOptions,
)
