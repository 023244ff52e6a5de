"""ToFu (Token Fusion, WACV 2024, arXiv 2312.01026): prune similar tokens early, merge them late.

Followed: pairs come from ToMe's bipartite matching over keys, in its order (`tome.py`). Where a
layer answers far from linearly to mixtures of its inputs (the early ones), the token that gives up
its place is dropped; later ones merge by MLERP, the direction of the mean with the largest norm in
the group (`MergePlan.keep_norm`), because plain means shrink.
Different: the paper measures which layers are close to linear; here it is half of the depth for
every model, as in the PiToMe authors' comparison. The mean is size-weighted as in ToMe, and its own
norm is divided out, which the released comparison leaves out.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor

from ...common import check_range
from ..algorithm import Algorithm, MergeContext
from ..matching import alternating_pairs
from ..plan import MergePlan
from . import tome


@dataclass(frozen=True)
class TofuOptions(tome.TomeOptions):
    """ToMe's option, and where ToFu changes over from pruning to merging.

    Attributes:
        pruning_depth: relative depth in [0, 1] up to which tokens are pruned.
    """

    pruning_depth: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("pruning_depth", self.pruning_depth, 0, 1)


def plan(keys: Tensor, n_out: int, *, ctx: MergeContext) -> MergePlan:
    """ToMe's pairs; what becomes of them depends on the depth.

    At most half of the N tokens can go: n_out = N - r with 2 r <= N, else a ValueError.
    """
    pairs = tome.plan(keys, n_out, ctx=ctx)
    early = ctx.depth <= ctx.own(TofuOptions).pruning_depth
    return dataclasses.replace(pairs, prune=early, keep_norm=not early)


# Sizes count also where a value was dropped (it was as good as its partner's), so log(size) belongs
# into the attention and the language model is told, as with ToMe.
ALGORITHM = Algorithm(
    name="tofu",
    plan=plan,
    source="ToFu, arXiv 2312.01026, section 3",
    pairs_compared=alternating_pairs,
    options=TofuOptions,
)
