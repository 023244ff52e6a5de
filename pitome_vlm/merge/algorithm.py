"""The contract between an algorithm and whoever applies its plan, and what both compute with.

Handles what an algorithm may look at and how it is called as often as needed. How a plan is applied
is up to `plan.py`.

Axes: B images, N tokens before, M tokens after a merge, C channels.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .config import SHARED, MergeConfig, Metric, Stage
from .options import NoOptions, Own
from .plan import MergePlan

__all__ = [
    "Algorithm",
    "MergeContext",
    "MergePlan",
    "PairLimits",
    "PlanFunction",
    "cosine_similarity",
    "every_pair",
    "gone_with_kept",
    "log_size_bias",
    "make_plan",
    "unit_vectors",
]


# A generator cannot be made inside a compiled graph; there the permutation is part of the graph.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _permutation(seed: int, n: int, device: torch.device) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(device)


@dataclass(frozen=True)
class PairLimits:
    """How many pairs of tokens an algorithm may hold at once; what it decides is the same.

    Attributes:
        whole_up_to: most tokens N of an image whose N x N cosines are made in one piece, for all
            images of a batch together. One number for every batch size and dtype, so that
            batching changes no answer.
        piece_bytes: memory of one piece of the cosines of one image where there are more.
    """

    whole_up_to: int = 4096
    piece_bytes: int = 8 * 2**20


@dataclass(frozen=True)
class MergeContext:
    """What an algorithm may look at besides the keys. Never mutated.

    Attributes:
        config: the options.
        layer: 0-based layer (or step) index; with the seed it names a random draw.
        depth: l / L, the layer's relative depth in [0, 1]; 1 only after the last layer.
        n_leading: protected tokens (CLS) at the start. They are removed before an algorithm is
            called; ToMe needs their number for its parity.
        at_projector: the step is on the features that the projector reads, after the tower.
        tower_only: nothing follows the tower that could do with fewer tokens: an encoder on its
            own.
        grid: (rows, columns) while the tokens are still the whole patch grid, else None.
        sizes: [B, N] float32 patches that each token stands for, None for all one.
        cls_attention: [B, N] float32, how much of the class token's attention (mean over heads)
            goes to each of them; None unless the algorithm asks for it.
        pairs: how many pairs of tokens may be held at once; None for what is usual.
        order: [B, N] int64, the tokens in the order that the plan of the tower layer before left
            them in (`MergePlan.order`); None for the one they have.
    """

    config: MergeConfig
    layer: int = 0
    depth: float = 0.0
    n_leading: int = 0
    at_projector: bool = False
    tower_only: bool = False
    grid: tuple[int, int] | None = None
    sizes: Tensor | None = None
    cls_attention: Tensor | None = None
    pairs: PairLimits | None = None
    order: Tensor | None = None

    def own(self, kind: type[Own]) -> Own:
        """The options that belong to the algorithm itself.

        Args:
            kind: their class, as in `Algorithm.options`.
        """
        return self.config.own(kind)

    def required_attention(self) -> Tensor:
        """`cls_attention`, for algorithms that rank by it.

        Raises:
            ValueError: there is none, because nobody but a layer of the tower can give it.
        """
        if self.cls_attention is None:
            raise ValueError(
                "this algorithm ranks tokens by the attention they get (MergeContext."
                'cls_attention), which only a layer of the tower can tell; use stage="tower"'
            )
        return self.cls_attention

    def random_order(self, n: int, device: torch.device) -> Tensor:
        """A permutation of 0..n-1, [n] int64, fixed by seed and layer.

        Drawn from a generator of its own on the CPU (no global state, the same on every device)
        and shared by all images of a batch, so that batching never changes an answer.
        """
        order: Tensor = _permutation(self.config.seed * 1_000_003 + self.layer, n, device)
        return order


class PlanFunction(Protocol):
    """Decide which tokens become one: keys [B, N, D] and a count to a `MergePlan`."""

    def __call__(self, keys: Tensor, n_out: int, *, ctx: MergeContext) -> MergePlan:
        """Return a plan with exactly `n_out` groups; must not change its arguments."""
        ...


def every_pair(n_in: int, n_out: int, ctx: MergeContext) -> int:
    """Pairs of tokens compared where every token is compared with every other one."""
    del n_out, ctx
    return n_in * n_in


def gone_with_kept(n_in: int, n_out: int, ctx: MergeContext) -> int:
    """Pairs compared where every token that goes is compared with every one that stays."""
    del ctx
    return (n_in - n_out) * n_out


def patches_only(ctx: MergeContext) -> bool:
    """`Algorithm.counts_leading` where the share that `ratio` keeps is one of the patches."""
    del ctx
    return False


@dataclass(frozen=True)
class Algorithm:
    """A way to decide which tokens are merged, with its defaults.

    Attributes:
        name: registry name.
        plan: the decision.
        source: paper and section it follows.
        pairwise: one call can at most halve the tokens; larger reductions are chained.
        default_stage: where it merges when the user does not say: its authors' place.
        tower_share: with stage "both", share of the (logarithmic) reduction done in the tower
            when the user does not say.
        one_step: reduces once, at the last merging layer.
        few_layers: merges in two layers of a tower where none are named and the rest is left to
            the projector, with stage "both" (`default_layers`).
        needs_grid: works on the whole patch grid only.
        needs_attention: reads `MergeContext.cls_attention`, hence works inside the tower only.
        metric: what tokens are compared by when the user does not say.
        encoder_metric: the same in an encoder on its own, None for `metric`.
        proportional_attention: log(size) in the tower's attention by default.
        calibrated: sizes and positions are told to the language model by default.
        compares: tokens with each other, which is what it costs (`costs`).
        pairs_compared: (N, M, context) to how many pairs a step from N to M tokens compares.
        counts_leading: from a layer's context to whether leading tokens (CLS) count among those of
            which `ratio` keeps a share.
        options: the class of its own options, a frozen dataclass that checks its values and can
            be made without arguments; `MergeContext.own` gives it to `plan`.
    """

    name: str
    plan: PlanFunction
    source: str
    pairwise: bool = True
    default_stage: Stage = "tower"
    tower_share: float = 0.5
    one_step: bool = False
    few_layers: bool = False
    needs_grid: bool = False
    needs_attention: bool = False
    metric: Metric = "keys"
    encoder_metric: Metric | None = None
    proportional_attention: bool = True
    calibrated: bool = True
    compares: bool = True
    pairs_compared: Callable[[int, int, MergeContext], int] = every_pair
    counts_leading: Callable[[MergeContext], bool] = patches_only
    options: type[Any] = NoOptions

    def __post_init__(self) -> None:
        if not getattr(getattr(self.options, "__dataclass_params__", None), "frozen", False):
            raise TypeError(
                f"options of algorithm {self.name!r} must be a frozen dataclass, got "
                f"{self.options!r}"
            )
        for item in dataclasses.fields(self.options):
            if item.name in (*SHARED, "options"):
                raise ValueError(
                    f"algorithm {self.name!r} has an option {item.name!r}, which all algorithms "
                    "share; give it another name"
                )

    def compares_keys(self, config: MergeConfig, *, tower_only: bool) -> bool:
        """Whether tokens in a tower are compared by attention keys, else by hidden states.

        Args:
            config: the options.
            tower_only: see `MergeContext`.
        """
        own = self.encoder_metric if tower_only else None
        return (config.metric or own or self.metric) == "keys"


@torch.no_grad()
def make_plan(
    algorithm: Algorithm,
    keys: Tensor,
    n_out: int,
    *,
    ctx: MergeContext,
    sizes: Tensor | None = None,
) -> MergePlan:
    """Ask an algorithm for a plan over the mergeable tokens, in as many calls as it needs.

    The leading (protected) tokens are cut off before the algorithm sees anything and put back
    before those of its plan. No gradient flows through the decision.

    Args:
        algorithm: makes the plans.
        keys: [B, n_leading + N, D], what tokens are compared by.
        n_out: mergeable tokens to leave, 1 <= n_out <= N.
        ctx: what the algorithm may look at.
        sizes: [B, n_leading + N] float32, None for those of the context; they weight the means
            that later calls of a chain compare.

    Raises:
        ValueError: `n_out` is out of range, or the algorithm returned another count.
        TypeError: it returned something else than a plan.
    """
    body = keys[:, ctx.n_leading :].detach()
    weights = ctx.sizes if sizes is None else sizes[:, ctx.n_leading :]
    n_in = body.shape[1]
    if not 1 <= n_out <= n_in:
        raise ValueError(f"n_out must be in 1..{n_in} (the tokens there are), got {n_out}")
    plan: MergePlan | None = None
    # Scores are float32 also under autocast, or training would decide otherwise than inference.
    device = keys.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if autocast else contextlib.nullcontext():
        while n_in > n_out:
            n_in = max(n_out, (n_in + 1) // 2) if algorithm.pairwise else n_out
            # Later steps compare the means of the groups made so far.
            means, grown = (body, weights) if plan is None else plan.apply(body, weights)
            asked = ctx if grown is ctx.sizes else dataclasses.replace(ctx, sizes=grown)
            if plan is not None and asked.order is not None:
                asked = dataclasses.replace(asked, order=None)
            step = algorithm.plan(means, n_in, ctx=asked)
            if not isinstance(step, MergePlan):
                raise TypeError(
                    f"the plan of algorithm {algorithm.name!r} must be a MergePlan, got "
                    f"{type(step).__name__}"
                )
            if step.n_out != n_in:
                raise ValueError(
                    f"algorithm {algorithm.name!r} left {step.n_out} tokens, not {n_in}"
                )
            plan = step if plan is None else plan.then(step)
    return (plan or MergePlan.identity(body)).with_leading(ctx.n_leading)


def cosine_similarity(keys: Tensor) -> Tensor:
    """[..., N, D] to [..., N, N] cosines, at least float32; a zero token is similar to nothing."""
    unit = unit_vectors(keys)
    return unit @ unit.mT


def unit_vectors(keys: Tensor) -> Tensor:
    """[..., N, D] scaled to length one, at least float32; a zero token stays zero."""
    exact = torch.promote_types(keys.dtype, torch.float32)
    # On a CPU operators that are given two dtypes take several times as long.
    keys = keys.to(exact) if keys.device.type == "cpu" else keys
    length = torch.linalg.vector_norm(keys, dim=-1, keepdim=True, dtype=exact)
    unit: Tensor = keys / length.clamp_min_(1e-12)
    return unit


def log_size_bias(sizes: Tensor, dtype: torch.dtype) -> Tensor:
    """Proportional attention as an additive mask: softmax(QK^T / sqrt(h) + log m), paper 3.1.

    Args:
        sizes: [B, N] float32.
        dtype: of the attention logits.

    Returns:
        [B, 1, 1, N].
    """
    exact = sizes.to(torch.promote_types(dtype, torch.float32))
    return exact.log().to(dtype)[:, None, None, :]
