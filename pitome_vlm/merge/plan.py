"""What a merge is and how it is carried out.

Handles groups of tokens, size-weighted means, sizes and source maps. Who decided the groups and why
is the business of the algorithms.

Axes: B images, N tokens before, M tokens after a merge, C channels.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class MergePlan:
    """A partition of N tokens into M groups, the same shape for every image of a batch.

    Made by `from_pairs`, `from_groups`, `from_assignment` or `identity`; all tensors are int64 and
    computed once, without reading a value back from the device.

    Attributes:
        assign: [B, N], the group of every token, 0..M-1.
        kept: [B, M], the token each group is named after; its place is the group's place.
        moved: [B, N - M], the tokens that give up their place.
        target: [B, N - M], the group of every moved token.
        named: [B, N - M], the token that this group is named after.
        prune: the group's value is its named token alone instead of the mean. The other members
            are still counted in its size, so that sizes add up to all patches.
        dropped: [B, N] bool, members that count in their group's size and give nothing to its
            mean; None for none. A group's named token always gives.
        keep_norm: means are scaled to the largest norm in their group (MLERP).
        order: [B, M], all groups in the order in which the next plan is to take them
            (`MergeContext.order`); None for the one they have.
    """

    assign: Tensor
    kept: Tensor
    moved: Tensor
    target: Tensor
    named: Tensor
    prune: bool = False
    dropped: Tensor | None = None
    keep_norm: bool = False
    order: Tensor | None = None

    @property
    def n_in(self) -> int:
        """N, tokens before."""
        return self.assign.shape[1]

    @property
    def n_out(self) -> int:
        """M, tokens after."""
        return self.kept.shape[1]

    @classmethod
    def identity(cls, keys: Tensor) -> MergePlan:
        """Every token its own group, for keys [B, N, ...]."""
        index = torch.arange(keys.shape[1], device=keys.device).expand(keys.shape[0], -1)
        nothing = index[:, :0]
        return cls(index, index, nothing, nothing, nothing)

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
        batch, n_out = len(sources), n_tokens - sources.shape[1]
        kept = order
        if kept is None:
            # A stable sort brings those that stay to the front: no data-dependent shape, hence no
            # host synchronisation on an accelerator.
            gone = sources.new_zeros(batch, n_tokens, dtype=torch.int8).scatter_(1, sources, 1)
            kept = gone.argsort(dim=1, stable=True)[:, :n_out]
        places = torch.arange(n_out, device=sources.device).expand(batch, n_out)
        assign = sources.new_empty(batch, n_tokens).scatter_(1, kept, places)
        target = assign.gather(1, destinations)
        return cls(assign.scatter_(1, sources, target), kept, sources, target, destinations, prune)

    @classmethod
    def from_groups(
        cls,
        assign: Tensor,
        kept: Tensor,
        *,
        prune: bool = False,
        dropped: Tensor | None = None,
        keep_norm: bool = False,
    ) -> MergePlan:
        """Groups and the tokens they are named after.

        Args:
            assign: [B, N] int64 with every value of 0..M-1 present in every row.
            kept: [B, M] int64, a member of every group.
            prune: see `MergePlan`.
            dropped: [B, N] bool, see `MergePlan`.
            keep_norm: see `MergePlan`.
        """
        stays = torch.zeros_like(assign, dtype=torch.int8).scatter_(1, kept, 1)
        moved = stays.argsort(dim=1, stable=True)[:, : assign.shape[1] - kept.shape[1]]
        target = assign.gather(1, moved)
        named = kept.gather(1, target)
        return cls(assign, kept, moved, target, named, prune, dropped, keep_norm)

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
        return cls.from_groups(assign, first.scatter_reduce(1, assign, index, "amin"))

    def then(self, later: MergePlan) -> MergePlan:
        """This plan followed by another one on its output, as one plan."""
        dropped = self.dropped
        if later.dropped is not None:
            carried = later.dropped.gather(1, self.assign)
            dropped = carried if dropped is None else dropped | carried
        plan = MergePlan.from_groups(
            later.assign.gather(1, self.assign),
            self.kept.gather(1, later.kept),
            prune=self.prune or later.prune,
            dropped=dropped,
            keep_norm=self.keep_norm or later.keep_norm,
        )
        return dataclasses.replace(plan, order=later.order)

    def with_leading(self, n_leading: int) -> MergePlan:
        """The same plan with `n_leading` untouched tokens (CLS) before its own."""
        if n_leading == 0:
            return self
        dropped = self.dropped
        if dropped is not None:
            dropped = torch.nn.functional.pad(dropped, (n_leading, 0))
        leading = torch.arange(n_leading, device=self.kept.device).expand(len(self.kept), -1)
        order = self.order
        if order is not None:
            order = torch.cat([leading, order + n_leading], 1)
        return MergePlan(
            torch.cat([leading, self.assign + n_leading], 1),
            torch.cat([leading, self.kept + n_leading], 1),
            self.moved + n_leading,
            self.target + n_leading,
            self.named + n_leading,
            self.prune,
            dropped,
            self.keep_norm,
            order,
        )

    def _sums(self, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weights of every group [B, M] and of every moved token [B, N - M]; None for all one."""
        if weights is None:
            total = torch.ones_like(self.kept, dtype=torch.float32)
            joining = total.new_ones(1, 1).expand_as(self.moved)
        else:
            total, joining = weights.gather(1, self.kept), weights.gather(1, self.moved)
        return total.scatter_add_(1, self.target, joining), joining

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
        sums = self._sums(sizes)
        new_sizes = sums[0]
        exact = torch.promote_types(x.dtype, torch.float32)
        merged = take_tokens(x, self.kept)
        if self.prune or self.n_in == self.n_out:
            return merged, new_sizes
        weights = sizes if weighted else None
        if self.dropped is not None:
            give = ~self.dropped
            weights = give.float() if weights is None else weights * give
        if weights is not sizes:
            sums = self._sums(weights)
        change = self._changes(x, *sums, exact)
        if self.keep_norm:
            return self._with_largest_norm(x, merged.to(exact), change), new_sizes
        return self._add(merged, change), new_sizes

    def _changes(self, x: Tensor, total: Tensor, joining: Tensor, dtype: torch.dtype) -> Tensor:
        """What every moved token changes in the mean of its group.

        The mean of a group is its named token v plus w_i / W (v_i - v) for each of the others:
        most tokens are alone and are not touched, and equal ones change nothing.

        Args:
            x: [B, N, C].
            total: [B, M] sums of the weights W.
            joining: [B, N - M] weights of the moved tokens.
            dtype: to compute in.

        Returns:
            [B, N - M, C].
        """
        share = joining.to(dtype) / total.gather(1, self.target).to(dtype)
        values = take_tokens(x, self.moved).to(dtype)
        return (values - take_tokens(x, self.named)).mul_(share[..., None])

    def _add(self, merged: Tensor, change: Tensor) -> Tensor:
        """Groups' named tokens [B, M, C] and what their other members change."""
        target = self.target
        if change.dtype != merged.dtype:
            # Sums of half-precision values lose bits: the first moved token of a group collects
            # what all of them change, and the others add nothing.
            n_moved = target.shape[1]
            place = torch.arange(n_moved, device=target.device).expand_as(target)
            leader = torch.full_like(self.kept, n_moved).scatter_reduce_(1, target, place, "amin")
            slot, sums = leader.gather(1, target), torch.zeros_like(change)
            change = add_tokens(sums, slot, change).to(merged.dtype)
        return add_tokens(merged, target, change)

    def _with_largest_norm(self, x: Tensor, named: Tensor, change: Tensor) -> Tensor:
        """Means [B, M, C] scaled to the largest norm among their members."""
        moved, target = self.moved, self.target
        norms = take_tokens(x, moved).to(named.dtype).norm(dim=-1)
        largest = named.norm(dim=-1).scatter_reduce(1, target, norms, "amax")
        alone = torch.ones_like(largest).scatter(1, target, 0.0).bool()
        merged = self._add(named.clone(), change)
        scaled = merged * (largest / merged.norm(dim=-1).clamp(min=1e-12))[..., None]
        # A token on its own keeps its value bit for bit.
        return torch.where(alone[..., None], named, scaled).to(x.dtype)


def _flat_rows(index: Tensor, n_tokens: int) -> Tensor:
    """Token numbers [B, K] per image as row numbers [B K] of a batch laid out as [B N, C]."""
    first = torch.arange(0, index.shape[0] * n_tokens, n_tokens, device=index.device)
    return (index + first[:, None]).reshape(-1)


def take_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Rows of every image: [B, N, C] at [B, K] to [B, K, C]; `gather`, but row by row."""
    if x.shape[0] == index.shape[0] == 1:
        return x.index_select(1, index[0])
    rows = x.reshape(-1, x.shape[-1]).index_select(0, _flat_rows(index, x.shape[1]))
    return rows.view(*index.shape, x.shape[-1])


def add_tokens(x: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """Rows [B, K, C] added to those of x [B, N, C], contiguous, at [B, K]; changes x."""
    if x.shape[0] == index.shape[0] == 1:
        return x.index_add_(1, index[0], values)
    x.view(-1, x.shape[-1]).index_add_(0, _flat_rows(index, x.shape[1]), values.flatten(0, 1))
    return x
