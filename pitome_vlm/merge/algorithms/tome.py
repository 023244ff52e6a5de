"""ToMe (ICLR 2023, arXiv 2210.09461): merge the most similar pairs, whoever they are.

Written from the paper's description of bipartite soft matching. Unlike PiToMe it does not ask which
tokens carry information.

Followed: the two sides of a layer's matching are every second token of what the published code's
layer before left: tokens that were possible sources and stayed, then all destinations, with the
class token first. `token_order="raster"`, every second token of the image, is ours.
Different: `ratio` is PiToMe's share of the patches (ToMe takes the same number of tokens away in
every layer; its form in PiToMe's comparison counts the class token too, one token more or less).
The language model sees raster order, unless `restore_order=False`. On a tower without a class token
sources that stay keep their order, where the published code sorts them by similarity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from torch import Tensor

from ...common import check_choice
from ..algorithm import Algorithm, MergeContext
from ..matching import TokenOrder, alternating_pairs, match_alternating
from ..plan import MergePlan
from ..similarity import Similarity


@dataclass(frozen=True)
class TomeOptions:
    """ToMe's own option.

    Attributes:
        token_order: order of which every second token is a possible source: "reference" is what
            the published code's layer before left, "raster" the image's.
    """

    token_order: TokenOrder = "reference"

    def __post_init__(self) -> None:
        check_choice("token_order", self.token_order, get_args(TokenOrder))


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
    order = ctx.own(TomeOptions).token_order
    return match_alternating(Similarity(keys, ctx.pairs), n_tokens - n_out, order, ctx=ctx)


ALGORITHM = Algorithm(
    name="tome",
    plan=plan,
    source="ToMe, arXiv 2210.09461, section 3",
    pairs_compared=alternating_pairs,
    options=TomeOptions,
)
