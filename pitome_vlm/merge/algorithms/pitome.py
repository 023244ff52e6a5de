"""PiToMe (NeurIPS 2024, arXiv 2405.16148): protect informative tokens, merge the redundant.

Written from the paper's formulas (eq. 3-4, Algorithm 1). The variants of the authors' released code
are options of this one algorithm, not copies.

Order: Algorithm 1 returns the protected tokens and then the receivers, both by energy. Here tokens
stay in raster order, and `restore_order=False` gives the language model theirs. No group depends on
it, because energies and similarities do not (of equal ones the earlier token wins); the released
code's early layers match by position, so that there the order decides, and theirs is followed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ...common import check_choice, check_flag, check_range
from ..algorithm import Algorithm, MergeContext, every_pair
from ..matching import alternating_pairs, match_alternating, match_most_similar
from ..plan import MergePlan
from ..similarity import Similarity

Energy = Literal["paper", "elu", "gaussian"]
Split = Literal["ordered", "random", "high_low"]


@dataclass(frozen=True)
class EnergyOptions:
    """How redundant a token is, as a number.

    Attributes:
        energy: form of f_m: paper eq. 4, the released code's ELU, or the Gaussian kernel.
        alpha: alpha of eq. 4, >= 0.
        margin: fixed margin m in [-1, 1]; None is the paper's 0.9 - 0.9 l / L.
    """

    energy: Energy = "paper"
    alpha: float = 1.0
    margin: float | None = None

    def __post_init__(self) -> None:
        check_choice("energy", self.energy, get_args(Energy))
        check_range("alpha", self.alpha, 0, math.inf)
        if self.margin is not None:
            check_range("margin", self.margin, -1, 1)

    def margin_at(self, depth: float) -> float:
        """The margin at a relative depth l / L in [0, 1]."""
        return margin_at(depth) if self.margin is None else self.margin


@dataclass(frozen=True)
class PitomeOptions(EnergyOptions):
    """The variants of PiToMe.

    Attributes:
        split: how the 2k mergeable tokens become sources and destinations.
        protect: keep the N - 2k tokens of lowest energy out of the matching.
        early_matching: up to this relative depth in [0, 1] plain bipartite matching is used
            instead of energy; 0 is never. It is the released code's: in its order of tokens
            (`tome.py`), and of the tokens that `ratio` keeps a share of the leading ones (CLS) are
            some. The released recipe has 0.5, on 24 layers the fixed `layer <= 12` of its code.
    """

    split: Split = "ordered"
    protect: bool = True
    early_matching: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("split", self.split, get_args(Split))
        check_flag("protect", self.protect)
        check_range("early_matching", self.early_matching, 0, 1)


def margin_at(depth: float) -> float:
    """The paper's m_l = 0.9 - 0.9 l / L for a relative depth l / L in [0, 1]."""
    return 0.9 - 0.9 * depth


def energy_score(
    similarity: Tensor,
    margin: float,
    *,
    form: str,
    alpha: float,
    first: int = 0,
    overwrite: bool = False,
) -> Tensor:
    """How redundant each token is: E_i = 1/N sum over its neighbours j of f_m(cos(v_i, v_j)).

    Args:
        similarity: [B, N, N] cosines, or some of their rows.
        margin: m.
        form: "paper" is eq. 4, f_m(x) = x if x >= m else alpha (exp(x - m) - 1); "elu" is the
            released code's ELU(x - m); "gaussian" the released text model's kernel with
            sigma = 1 - m.
        alpha: alpha of eq. 4.
        first: number of the first row, where only some are given.
        overwrite: `similarity` may be written over.

    Returns:
        [B, rows]; high energy means a large cluster, hence mergeable.
    """
    if form == "paper":
        # Both branches as a sum of which one is zero, in place: fresh memory for every N x N step
        # costs more than the arithmetic, `where` and masks of bools several times as much.
        # `expm1` takes twice as long as `exp`, and its further digits are lost in the sum.
        # `threshold` takes x > t; what is m but for the rounding of a cosine counts as m.
        below_margin = margin - 2 * torch.finfo(similarity.dtype).eps
        score = torch.threshold(similarity, below_margin, 0.0)
        below = similarity.sub_(margin) if overwrite else similarity - margin
        score = score.add_(below.clamp_max_(0).exp_().sub_(1), alpha=alpha)
    elif form == "elu":
        score = torch.nn.functional.elu(similarity - margin, alpha=alpha)
    else:
        # A margin of one would be a kernel of width zero.
        sigma = max(1 - margin, 1e-2)
        score = torch.exp(-((1 - similarity) ** 2) / (2 * sigma**2))
        score = score / (sigma * math.sqrt(2 * math.pi))
    # A token is not its own neighbour.
    own = score.diagonal(first, -2, -1)
    return score.sum(-1).sub_(own).div_(similarity.shape[-1])


def energies(
    similarity: Similarity, options: EnergyOptions, depth: float, *, last: bool = False
) -> Tensor:
    """`energy_score` of all tokens [B, N] at a relative depth l / L in [0, 1].

    `last` is that of `Similarity.by_row`.
    """
    margin, form, alpha = options.margin_at(depth), options.energy, options.alpha
    return similarity.by_row(
        lambda rows, first: energy_score(
            rows, margin, form=form, alpha=alpha, first=first, overwrite=last
        ),
        last=last,
    )


def plan(keys: Tensor, n_out: int, *, ctx: MergeContext) -> MergePlan:
    """Paper Algorithm 1, lines 2-10; see `PitomeOptions` for the variants.

    At most half of the N tokens can go: n_out = N - k with 2 k <= N, else a ValueError.
    """
    options, n_tokens = ctx.own(PitomeOptions), keys.shape[1]
    n_merge = n_tokens - n_out
    if 2 * n_merge > n_tokens:
        raise ValueError(
            f"pitome merges at most half of the tokens in one step (2k <= N): n_out must be in "
            f"{(n_tokens + 1) // 2}..{n_tokens}, got {n_out}"
        )
    similarity = Similarity(keys, ctx.pairs)
    if _matches_early(options, ctx.depth):
        return match_alternating(similarity, n_merge, "reference", ctx=ctx)
    last = _computes_edges_again(n_tokens, n_out, options)
    energy = energies(similarity, options, ctx.depth, last=last)
    by_energy = energy.argsort(dim=-1, descending=True, stable=True)
    if not options.protect:
        halves = by_energy[:, ::2], by_energy[:, 1::2]
        sources, destinations = match_most_similar(similarity, *halves, n_merge)
        return MergePlan.from_pairs(n_tokens, sources, destinations)
    side_a, side_b = _split(by_energy[:, : 2 * n_merge], options.split, ctx)
    _, partner = similarity.best(side_a, side_b)
    order = None
    if not ctx.config.restore_order:
        order = torch.cat([by_energy[:, 2 * n_merge :], side_b], 1)
    return MergePlan.from_pairs(n_tokens, side_a, side_b.gather(1, partner), order=order)


def _matches_early(options: PitomeOptions, depth: float) -> bool:
    return options.early_matching > 0 and depth <= options.early_matching


def _computes_edges_again(n_in: int, n_out: int, options: PitomeOptions) -> bool:
    """Where few tokens go, their k x k products are cheaper than the memory to keep all N x N."""
    return options.protect and 8 * (n_in - n_out) <= n_in


def pairs_compared(n_in: int, n_out: int, ctx: MergeContext) -> int:
    """All pairs and those matched; in the early layers of the released code those of ToMe."""
    options = ctx.own(PitomeOptions)
    if _matches_early(options, ctx.depth):
        return alternating_pairs(n_in, n_out, ctx)
    again = (n_in - n_out) ** 2 if _computes_edges_again(n_in, n_out, options) else 0
    return every_pair(n_in, n_out, ctx) + again


def counts_leading(ctx: MergeContext) -> bool:
    """Those of `ratio` in the layers that match early."""
    return _matches_early(ctx.own(PitomeOptions), ctx.depth)


def _split(mergeable: Tensor, how: Split, ctx: MergeContext) -> tuple[Tensor, Tensor]:
    """The 2k mergeable tokens [B, 2k], in energy order, into sources and destinations [B, k]."""
    half = mergeable.shape[1] // 2
    if how == "ordered":
        return mergeable[:, ::2], mergeable[:, 1::2]
    if how == "high_low":
        return mergeable[:, :half], mergeable[:, half:]
    shuffled = mergeable[:, ctx.random_order(2 * half, mergeable.device)]
    return shuffled[:, :half], shuffled[:, half:]


ALGORITHM = Algorithm(
    name="pitome",
    plan=plan,
    source="PiToMe, arXiv 2405.16148, eq. 3-4 and Algorithm 1",
    pairs_compared=pairs_compared,
    counts_leading=counts_leading,
    options=PitomeOptions,
)
