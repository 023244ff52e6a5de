"""What a merge is and how it is carried out.

Knows: groups of tokens, size-weighted means, sizes, source maps. Does not know: who decided the
groups and why, and nothing about models.

Axes: B images, N tokens before, M tokens after a merge, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class MergePlan:
    """A partition of N tokens into M groups, the same shape for every image of a batch.

    Args:
        given_assign: [B, N] int64, the group of every token, 0..M-1; None where it follows from
            `given_moves`.
        given_kept: [B, M] int64, the token each group is named after; its place is the group's
            place. None where it follows from `given_moves`: raster order.
        prune: the group's value is its named token alone instead of the mean. The other members
            are still booked on it, so that sizes count every patch.
        dropped: [B, N] bool, members that are booked on their group and give nothing to its mean;
            None for none. A group's named token always gives.
        keep_norm: means are scaled to the largest norm in their group (MLERP).
        blend: [B, N, C] to [B, M, C], the new tokens as fixed combinations of all old ones instead
            of means of groups (a resampling); `assign` then says whom each one mostly stands for.
        given_moves: the tokens that give up their place, and the named tokens of the groups they
            join, each [B, N - M] int64; None where they follow from `given_assign`.
        n_in: N.
        n_leading: tokens in front that `blend` is not shown and that stay as they are.
    """

    given_assign: Tensor | None
    given_kept: Tensor | None
    prune: bool = False
    dropped: Tensor | None = None
    keep_norm: bool = False
    blend: Callable[[Tensor], Tensor] | None = None
    given_moves: tuple[Tensor, Tensor] | None = None
    n_in: int = -1
    n_leading: int = 0
    # What was asked for once (`functools.cached_property` takes a lock, which no compiler enters).
    _known: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.given_assign is not None:
            object.__setattr__(self, "n_in", self.given_assign.shape[1])

    @property
    def assign(self) -> Tensor:
        """[B, N] int64, the group of every token. Most plans are applied without asking for it."""
        if self.given_assign is not None:
            return self.given_assign
        if "assign" not in self._known:
            kept, moved = self.kept, self.moved
            places = torch.arange(self.n_out, device=moved.device).expand_as(kept)
            assign = moved.new_empty(len(moved), self.n_in).scatter_(1, kept, places)
            self._known["assign"] = assign.scatter_(1, moved, self.target)
        found: Tensor = self._known["assign"]
        return found

    @property
    def kept(self) -> Tensor:
        """[B, M] int64, the token each group is named after."""
        if self.given_kept is not None:
            return self.given_kept
        if "kept" not in self._known:
            # A stable sort brings those that stay to the front: no data-dependent shape, hence no
            # host synchronisation on an accelerator.
            gone = self.moved.new_zeros(len(self.moved), self.n_in, dtype=torch.int8)
            order = gone.scatter_(1, self.moved, 1).argsort(dim=1, stable=True)
            self._known["kept"] = order[:, : self.n_out]
        found: Tensor = self._known["kept"]
        return found

    @property
    def moves(self) -> tuple[Tensor, Tensor]:
        """Tokens that give up their place, and the named ones of their groups, [B, N - M] int64."""
        if self.given_moves is not None:
            return self.given_moves
        if "moves" not in self._known:
            stays = torch.ones_like(self.assign).scatter_(1, self.kept, 0)
            moved = stays.argsort(dim=1, descending=True, stable=True)[:, : self.n_in - self.n_out]
            target = self.assign.gather(1, moved)
            self._known["target"] = target
            self._known["moves"] = (moved, self.kept.gather(1, target))
        found: tuple[Tensor, Tensor] = self._known["moves"]
        return found

    @property
    def moved(self) -> Tensor:
        """[B, N - M] int64, the tokens that give up their place."""
        return self.moves[0]

    @property
    def target(self) -> Tensor:
        """[B, N - M] int64, the group of every moved token."""
        _, named = self.moves
        if "target" not in self._known:
            if self.given_kept is None:
                found = torch.searchsorted(self.kept.contiguous(), named.contiguous())
            else:
                places = torch.arange(self.n_out, device=named.device).expand_as(self.kept)
                rank = named.new_empty(len(named), self.n_in).scatter_(1, self.kept, places)
                found = rank.gather(1, named)
            self._known["target"] = found
        target: Tensor = self._known["target"]
        return target

    @property
    def n_out(self) -> int:
        """Tokens after."""
        if self.given_kept is not None:
            return self.given_kept.shape[1]
        return self.n_in - self.moves[0].shape[1]

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
        return cls(None, order, prune, given_moves=(sources, destinations), n_in=n_tokens)

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
        """This plan followed by another one on its output, as one plan.

        Raises:
            ValueError: a resampling is no partition and has to be applied on its own.
        """
        if self.blend is not None or later.blend is not None:
            raise ValueError("a plan with `blend` cannot be chained; apply one after the other")
        dropped = self.dropped
        if later.dropped is not None:
            carried = later.dropped.gather(1, self.assign)
            dropped = carried if dropped is None else dropped | carried
        return MergePlan(
            later.assign.gather(1, self.assign),
            self.kept.gather(1, later.kept),
            self.prune or later.prune,
            dropped,
            self.keep_norm or later.keep_norm,
        )

    def with_leading(self, n_leading: int) -> MergePlan:
        """The same plan with `n_leading` untouched tokens (CLS) put in front."""
        if n_leading == 0:
            return self
        dropped, moves = self.dropped, self.given_moves
        if dropped is not None:
            dropped = torch.nn.functional.pad(dropped, (n_leading, 0))
        return MergePlan(
            None if self.given_assign is None else _behind(self.given_assign, n_leading),
            None if self.given_kept is None else _behind(self.given_kept, n_leading),
            self.prune,
            dropped,
            self.keep_norm,
            self.blend,
            None if moves is None else (moves[0] + n_leading, moves[1] + n_leading),
            self.n_in + n_leading,
            self.n_leading + n_leading,
        )

    def merge_sizes(self, sizes: Tensor | None) -> Tensor:
        """Patches behind every group: [B, N] sizes (None means all one) to [B, M] float32."""
        return self._sums(sizes)[0]

    def _sums(self, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weights of every group [B, M] and of every moved token [B, N - M]; None for all one."""
        kept = self.kept
        if weights is None:
            total = torch.ones(kept.shape, dtype=torch.float32, device=kept.device)
            joining = total.new_ones(1, 1).expand_as(self.moved)
        else:
            total, joining = weights.gather(1, kept), weights.gather(1, self.moved)
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
        if self.blend is not None:
            # Autocast would take the products in half precision.
            with torch.autocast(x.device.type, enabled=False):
                mixed = self.blend(x[:, self.n_leading :].to(exact)).to(x.dtype)
            if self.n_leading:
                mixed = torch.cat([x[:, : self.n_leading], mixed], 1)
            return mixed, new_sizes
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
        moved, named = self.moves
        share = joining.to(dtype) / total.gather(1, self.target).to(dtype)
        values = take_tokens(x, moved).to(dtype)
        return (values - take_tokens(x, named)).mul_(share[..., None])

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
        """Means scaled to the largest norm among their group's members: [B, M, C] in x's dtype.

        Args:
            x: [B, N, C].
            named: [B, M, C] the groups' named tokens, in the dtype to compute in.
            change: see `_changes`.
        """
        moved, target = self.moved, self.target
        norms = take_tokens(x, moved).to(named.dtype).norm(dim=-1)
        largest = named.norm(dim=-1).scatter_reduce(1, target, norms, "amax")
        alone = torch.ones_like(largest).scatter(1, target, 0.0).bool()
        merged = self._add(named.clone(), change)
        scaled = merged * (largest / merged.norm(dim=-1).clamp(min=1e-12))[..., None]
        # A token on its own keeps its value bit for bit.
        return torch.where(alone[..., None], named, scaled).to(x.dtype)

    def unmerge(self, y: Tensor) -> Tensor:
        """Spread group values back over their tokens: [B, M, C] to [B, N, C]."""
        return take_tokens(y, self.assign)


def _behind(index: Tensor, n_leading: int) -> Tensor:
    """[B, n] numbers of tokens as they are behind `n_leading` others, and those in front."""
    moved = torch.nn.functional.pad(index + n_leading, (n_leading, 0))
    if n_leading > 1:
        moved[:, :n_leading] = torch.arange(n_leading, device=index.device)
    return moved


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
