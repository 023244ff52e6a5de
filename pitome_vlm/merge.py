"""What a merge is and how it is carried out.

Knows: groups of tokens (`MergePlan`), size-weighted means, sizes, source maps, and the contract
between an algorithm and whoever applies its plan. Does not know: how any algorithm decides, and
nothing about models.

Axes: B images, N tokens before, M tokens after a merge, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from .config import MergeConfig, Stage


@dataclass(frozen=True)
class MergeContext:
    """What an algorithm may look at besides the keys. Never mutated.

    Attributes:
        config: the options.
        layer: 0-based layer (or step) index; with the seed it names a random draw.
        depth: l / L, the layer's relative depth in [0, 1]; 1 only behind the last layer.
        n_leading: protected tokens (CLS) in front. They are removed before an algorithm is
            called; ToMe needs their number for its parity.
        grid: (rows, columns) while the tokens are still the whole patch grid, else None.
    """

    config: MergeConfig
    layer: int = 0
    depth: float = 0.0
    n_leading: int = 0
    grid: tuple[int, int] | None = None

    def random_order(self, n: int, device: torch.device) -> Tensor:
        """A permutation of 0..n-1, [n] int64, fixed by seed and layer.

        Drawn from a generator of its own on the CPU (no global state, the same on every device)
        and shared by all images of a batch, so that batching never changes an answer.
        """
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.layer)
        return torch.randperm(n, generator=generator).to(device)


class PlanFunction(Protocol):
    """Decide which tokens become one: keys [B, N, D] and a count to a `MergePlan`."""

    def __call__(self, keys: Tensor, n_out: int, *, ctx: MergeContext) -> MergePlan:
        """Return a plan with exactly `n_out` groups; must not change its arguments."""
        ...


@dataclass(frozen=True)
class Algorithm:
    """A registered way to decide, and where it belongs when the user does not say.

    Attributes:
        name: registry name.
        plan: the decision.
        source: paper and section it follows.
        pairwise: one call can at most halve the tokens; larger reductions are chained.
        default_stage: where its authors put it.
        one_step: needs the whole grid, hence reduces once, at the last merging layer.
        proportional_attention: log(size) in the tower's attention by default.
    """

    name: str
    plan: PlanFunction
    source: str
    pairwise: bool = True
    default_stage: Stage = "tower"
    one_step: bool = False
    proportional_attention: bool = True


@dataclass(frozen=True)
class MergePlan:
    """A partition of N tokens into M groups, the same shape for every image of a batch.

    Attributes:
        assign: [B, N] int64, the group of every token, 0..M-1.
        kept: [B, M] int64, the token each group is named after; its place is the group's place.
        prune: the group's value is its named token alone instead of the mean. The other members
            are still booked on it, so that sizes count every patch.
    """

    assign: Tensor
    kept: Tensor
    prune: bool = False
    _moved: list[Tensor] = field(default_factory=list, repr=False, compare=False)

    @property
    def n_in(self) -> int:
        """Tokens before."""
        return self.assign.shape[1]

    @property
    def n_out(self) -> int:
        """Tokens after."""
        return self.kept.shape[1]

    @classmethod
    def identity(cls, keys: Tensor) -> MergePlan:
        """Every token its own group, for keys [B, N, ...]."""
        index = torch.arange(keys.shape[1], device=keys.device).expand(keys.shape[0], -1)
        return cls(index, index)

    @classmethod
    def from_pairs(
        cls,
        n_tokens: int,
        sources: Tensor,
        destinations: Tensor,
        *,
        order: Tensor | None = None,
        prune: bool = False,
    ) -> MergePlan:
        """Every source joins the group of its destination.

        Args:
            n_tokens: N.
            sources: [B, r] int64, distinct token indices per image.
            destinations: [B, r] int64, token indices that are no sources.
            order: [B, N - r] the surviving tokens in the order they are to come out; None keeps
                them in raster order.
            prune: see `MergePlan`.
        """
        batch, device = sources.shape[0], sources.device
        n_out = n_tokens - sources.shape[1]
        index = torch.arange(n_tokens, device=device).expand(batch, n_tokens)
        if order is None:
            stays = torch.ones(batch, n_tokens, dtype=torch.int64, device=device)
            stays = stays.scatter(1, sources, 0)
            rank = stays.cumsum(1) - 1
            # Sources write into one spare slot behind the survivors: no data-dependent shape,
            # hence no host synchronisation on an accelerator.
            slot = torch.where(stays.bool(), rank, n_out)
            order = index.new_empty(batch, n_out + 1).scatter(1, slot, index)[:, :n_out]
        else:
            places = torch.arange(n_out, device=device).expand(batch, n_out)
            rank = torch.zeros_like(index).scatter(1, order, places)
        assign = rank.scatter(1, sources, rank.gather(1, destinations))
        return cls(assign, order, prune, [sources])

    @classmethod
    def from_assignment(cls, assign: Tensor, n_out: int) -> MergePlan:
        """Groups given directly; each is named after its first member.

        Args:
            assign: [B, N] int64 with every value of 0..n_out-1 present in every row.
            n_out: M.
        """
        batch, n_tokens = assign.shape
        index = torch.arange(n_tokens, device=assign.device).expand(batch, n_tokens)
        first = torch.full((batch, n_out), n_tokens, dtype=torch.int64, device=assign.device)
        return cls(assign, first.scatter_reduce(1, assign, index, "amin"))

    def then(self, later: MergePlan) -> MergePlan:
        """This plan followed by another one on its output, as one plan."""
        return MergePlan(
            later.assign.gather(1, self.assign),
            self.kept.gather(1, later.kept),
            self.prune or later.prune,
        )

    def with_leading(self, n_leading: int) -> MergePlan:
        """The same plan with `n_leading` untouched tokens (CLS) put in front."""
        if n_leading == 0:
            return self
        batch, device = self.assign.shape[0], self.assign.device
        front = torch.arange(n_leading, device=device).expand(batch, n_leading)
        moved = [part + n_leading for part in self._moved]
        return MergePlan(
            torch.cat([front, self.assign + n_leading], 1),
            torch.cat([front, self.kept + n_leading], 1),
            self.prune,
            moved,
        )

    def sources(self) -> Tensor:
        """[B, N - M] int64, the tokens that give up their place."""
        if not self._moved:
            stays = torch.ones_like(self.assign).scatter(1, self.kept, 0)
            order = stays.argsort(dim=1, descending=True, stable=True)
            self._moved.append(order[:, : self.n_in - self.n_out])
        return self._moved[0]

    def merge_sizes(self, sizes: Tensor | None) -> Tensor:
        """Patches behind every group: [B, N] sizes (None means all one) to [B, M] float32."""
        if sizes is None:
            sizes = torch.ones(self.assign.shape, dtype=torch.float32, device=self.assign.device)
        moved = self.sources()
        kept = sizes.gather(1, self.kept)
        return kept.scatter_add(1, self.assign.gather(1, moved), sizes.gather(1, moved))

    def apply(
        self, x: Tensor, sizes: Tensor | None = None, *, weighted: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Merge token values (paper Algorithm 1, lines 11-13).

        Args:
            x: [B, N, C] floating point, any dtype; gradients flow through the means.
            sizes: [B, N] float32 patches each token stands for, None for all one.
            weighted: weight by size; otherwise every token of a group counts the same.

        Returns:
            ([B, M, C] in x's dtype, [B, M] float32 new sizes). A group of one keeps its value
            bit for bit.
        """
        new_sizes = self.merge_sizes(sizes)
        channels = x.shape[-1]
        kept = x.gather(1, self.kept[..., None].expand(-1, -1, channels))
        if self.prune or self.n_in == self.n_out:
            return kept, new_sizes
        moved = self.sources()
        target = self.assign.gather(1, moved)
        # Sums of many half-precision values lose bits; groups are small, so float32 costs little.
        exact = torch.promote_types(x.dtype, torch.float32)
        weights = sizes.to(exact) if weighted and sizes is not None else None
        share_kept, share_moved = self._shares(weights, moved, target, exact)
        merged = kept.to(exact) * share_kept[..., None]
        values = x.gather(1, moved[..., None].expand(-1, -1, channels)).to(exact)
        values = values * share_moved[..., None]
        merged = merged.scatter_add(1, target[..., None].expand(-1, -1, channels), values)
        return merged.to(x.dtype), new_sizes

    def _shares(
        self, weights: Tensor | None, moved: Tensor, target: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Each token's share of its group's mean, for kept [B, M] and moved [B, N - M] tokens."""
        if weights is None:
            weights = torch.ones(self.assign.shape, dtype=dtype, device=self.assign.device)
        total = self.merge_sizes(weights)
        return (
            weights.gather(1, self.kept) / total,
            weights.gather(1, moved) / total.gather(1, target),
        )

    def unmerge(self, y: Tensor) -> Tensor:
        """Spread group values back over their tokens: [B, M, C] to [B, N, C]."""
        return y.gather(1, self.assign[..., None].expand(-1, -1, y.shape[-1]))


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

    The leading (protected) tokens are cut off before the algorithm sees anything and put back in
    front of its plan. No gradient flows through the decision.

    Args:
        algorithm: who decides.
        keys: [B, n_leading + N, D], what tokens are compared by.
        n_out: mergeable tokens to leave, 1 <= n_out <= N.
        ctx: what the algorithm may look at.
        sizes: [B, n_leading + N] float32, None for all one; weights the means that later calls
            of a chain compare.

    Raises:
        ValueError: `n_out` is out of range, or the algorithm returned another count.
    """
    body = keys[:, ctx.n_leading :].detach()
    weights = None if sizes is None else sizes[:, ctx.n_leading :]
    n_in = body.shape[1]
    if not 1 <= n_out <= n_in:
        raise ValueError(f"n_out must be in 1..{n_in} (the tokens there are), got {n_out}")
    plan: MergePlan | None = None
    # Scores are float32 also under autocast, or training would decide otherwise than inference.
    with torch.autocast(keys.device.type, enabled=False):
        while n_in > n_out:
            n_in = max(n_out, (n_in + 1) // 2) if algorithm.pairwise else n_out
            # Later steps compare the means of the groups made so far.
            means = body if plan is None else plan.apply(body, weights)[0]
            step = algorithm.plan(means, n_in, ctx=ctx)
            if step.n_out != n_in:
                raise ValueError(
                    f"algorithm {algorithm.name!r} left {step.n_out} tokens, not {n_in}"
                )
            plan = step if plan is None else plan.then(step)
    return (plan or MergePlan.identity(body)).with_leading(ctx.n_leading)


def cosine_similarity(keys: Tensor) -> Tensor:
    """[B, N, D] to [B, N, N] cosines, at least float32; a zero token is similar to nothing."""
    exact = keys.to(torch.promote_types(keys.dtype, torch.float32))
    unit = torch.nn.functional.normalize(exact, dim=-1)
    return unit @ unit.transpose(-1, -2)


def log_size_bias(sizes: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Proportional attention as an additive mask: softmax(QK^T / sqrt(h) + log m), paper 3.1.

    Args:
        sizes: [B, N] float32, None for all one.
        dtype: of the attention logits.

    Returns:
        [B, 1, 1, N], or None where there is nothing to add.
    """
    if sizes is None:
        return None
    exact = sizes.to(torch.promote_types(dtype, torch.float32))
    return exact.log().to(dtype)[:, None, None, :]


def group_positions(source_map: Tensor, n_groups: int) -> Tensor:
    """Mean raster position of every group's patches: [B, N] map to [B, M] float32."""
    batch, n_tokens = source_map.shape
    raster = torch.arange(n_tokens, device=source_map.device, dtype=torch.float32)
    empty = torch.zeros(batch, n_groups, dtype=torch.float32, device=source_map.device)
    total = empty.scatter_add(1, source_map, raster.expand(batch, n_tokens))
    return total / empty.scatter_add(1, source_map, torch.ones_like(raster).expand(batch, n_tokens))
