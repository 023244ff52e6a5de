"""What a merge is and how it is carried out.

Handles groups of tokens, size-weighted means, sizes and source maps. Who decided the groups and why
is the business of the algorithms.

Axes: B images, N tokens before, M tokens after a merge, C channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class MergePlan:
    """A partition of N tokens into M groups, the same shape for every image of a batch.

    Made by `from_pairs`, `from_groups`, `from_assignment` or `identity`; all indices are int64 and
    computed without reading a value back from the device, what is derived from them once and only
    where it is asked for: a merge on a GPU costs as much as the kernels it launches.

    Attributes:
        n_in: N, tokens before.
        moved: [B, N - M], the tokens that give up their place; on a CPU they are added to their
            groups in this order.
        joins: [B, N - M], the tokens that the groups of those are named after, which stay.
        ordered: [B, M], the tokens that groups are named after in the order in which they are to
            come out; None for raster order.
        prune: the group's value is its named token alone instead of the mean. The other members
            are still counted in its size, so that sizes add up to all patches.
        dropped: [B, N] bool, members that count in their group's size and give nothing to its
            mean; None for none. A group's named token always gives.
        keep_norm: means are scaled to the largest norm in their group (MLERP).
        order: [B, M], all groups in the order in which the next plan is to take them
            (`MergeContext.order`); None for the one they have.
    """

    n_in: int
    moved: Tensor
    joins: Tensor
    ordered: Tensor | None = None
    prune: bool = False
    dropped: Tensor | None = None
    keep_norm: bool = False
    order: Tensor | None = None
    _known: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    # `functools.cached_property` takes a lock, which torch.compile cannot trace.
    def _once(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        if name not in self._known:
            self._known[name] = make()
        return self._known[name]

    @property
    def n_out(self) -> int:
        """M, tokens after."""
        return self.n_in - self.moved.shape[1]

    @property
    def kept(self) -> Tensor:
        """[B, M], the token each group is named after; its place is the group's place."""
        return self._once("kept", self._staying) if self.ordered is None else self.ordered

    def _staying(self) -> Tensor:
        # A stable sort brings those that stay to the front: no data-dependent shape, hence no
        # host synchronisation on an accelerator.
        gone = self.moved.new_zeros(len(self.moved), self.n_in, dtype=torch.uint8)
        return gone.scatter_(1, self.moved, 1).argsort(dim=1, stable=True)[:, : self.n_out]

    @property
    def named(self) -> Tensor:
        """[B, N], the token that every token's group is named after, which is a member of it."""
        return self._once("named", lambda: self._raster.scatter(1, self.moved, self.joins))

    @property
    def assign(self) -> Tensor:
        """[B, N], the group of every token, 0..M-1."""
        return self._once("assign", self._assigned)

    def _assigned(self) -> Tensor:
        return self.groups_of(self.named)

    def groups_of(self, staying: Tensor) -> Tensor:
        """[B, K], the groups 0..M-1 of tokens [B, K] that stay."""
        group = torch.empty_like(self._raster, memory_format=torch.contiguous_format)
        group = group.scatter_(1, self.kept, self._raster[:, : self.n_out])
        return group.gather(1, staying)

    @property
    def _raster(self) -> Tensor:
        """[B, N], the numbers of all tokens."""
        return self._once("raster", lambda: _numbers(self.n_in, self.moved))

    @classmethod
    def identity(cls, keys: Tensor) -> MergePlan:
        """Every token its own group, for keys [B, N, ...]."""
        nobody = torch.empty(len(keys), 0, dtype=torch.int64, device=keys.device)
        return cls(keys.shape[1], nobody, nobody)

    @classmethod
    def from_pairs(
        cls,
        n_tokens: int,
        sources: Tensor,
        destinations: Tensor,
        *,
        order: Tensor | None = None,
        staying: Tensor | None = None,
        prune: bool = False,
    ) -> MergePlan:
        """Every source joins the group of its destination.

        Args:
            n_tokens: N.
            sources: [B, r] int64, distinct token indices per image.
            destinations: [B, r] int64, token indices that are no sources.
            order: [B, N - r] the surviving tokens in the order they are to come out; None keeps
                them in raster order.
            staying: [B, N - r] the surviving tokens in raster order, where they are known.
            prune: see `MergePlan`.
        """
        plan = cls(n_tokens, sources, destinations, order, prune)
        if staying is not None and order is None:
            plan._known["kept"] = staying
        return plan

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
        named = kept.gather(1, assign)
        options = {"prune": prune, "dropped": dropped, "keep_norm": keep_norm}
        return cls._from_names(named, kept.shape[1], ordered=kept, **options)

    @classmethod
    def from_assignment(cls, assign: Tensor, n_out: int) -> MergePlan:
        """Groups given directly; each is named after its first member.

        Args:
            assign: [B, N] int64 with every value of 0..n_out-1 present in every row.
            n_out: M.
        """
        batch, n_tokens = assign.shape
        first = torch.full((batch, n_out), n_tokens, dtype=torch.int64, device=assign.device)
        tokens = _numbers(n_tokens, assign)
        return cls.from_groups(assign, first.scatter_reduce(1, assign, tokens, "amin"))

    @classmethod
    def _from_names(cls, named: Tensor, n_out: int, **options: Any) -> MergePlan:
        """Groups by the tokens they are named after, see `named`; members join in raster order."""
        n_tokens = named.shape[1]
        gone = (named != _numbers(n_tokens, named)).view(torch.uint8)
        places = gone.argsort(dim=1, stable=True)
        moved = places[:, n_out:]
        plan = cls(n_tokens, moved, named.gather(1, moved), **options)
        plan._known["named"] = named
        if plan.ordered is None:
            plan._known["kept"] = places[:, :n_out]
        return plan

    def taken_apart(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a plan is made of and what `apply` derives from it, for `put_together`."""
        known = {"kept": self.kept, "named": self.named, "assign": self.assign}
        return self._fields(), {**known, "raster": self._raster}

    def _fields(self) -> dict[str, Any]:
        return {item.name: getattr(self, item.name) for item in fields(self) if item.init}

    @classmethod
    def put_together(cls, own: dict[str, Any], known: dict[str, Tensor]) -> MergePlan:
        """The inverse of `taken_apart`: a compiled function can return these, but no plan."""
        plan = cls(**own)
        plan._known.update(known)
        return plan

    def then(self, later: MergePlan) -> MergePlan:
        """This plan followed by another one on its output, as one plan."""
        dropped, ordered = self.dropped, None
        if later.dropped is not None:
            carried = later.dropped.gather(1, self.assign)
            dropped = carried if dropped is None else dropped | carried
        if self.ordered is not None or later.ordered is not None:
            ordered = self.kept.gather(1, later.kept)
        moved, joins = (self.kept.gather(1, some) for some in (later.moved, later.joins))
        named = self._raster.scatter(1, moved, joins).gather(1, self.named)
        return self._from_names(
            named,
            later.n_out,
            ordered=ordered,
            prune=self.prune or later.prune,
            dropped=dropped,
            keep_norm=self.keep_norm or later.keep_norm,
            order=later.order,
        )

    def with_order(self, order: Tensor) -> MergePlan:
        """The same plan with another `order` [B, M]."""
        return self.put_together(self._fields() | {"order": order}, self._known)

    def with_leading(self, n_leading: int) -> MergePlan:
        """The same plan with `n_leading` untouched tokens (CLS) before its own."""
        if n_leading == 0:
            return self
        dropped = self.dropped
        if dropped is not None:
            dropped = torch.nn.functional.pad(dropped, (n_leading, 0))

        def moved_on(index: Tensor | None) -> Tensor | None:
            if index is None:
                return None
            return torch.cat([_numbers(n_leading, index), index + n_leading], 1)

        return dataclasses.replace(
            self,
            n_in=self.n_in + n_leading,
            moved=self.moved + n_leading,
            joins=self.joins + n_leading,
            ordered=moved_on(self.ordered),
            dropped=dropped,
            order=moved_on(self.order),
        )

    def _sums(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [B, N] of whole groups at the tokens they are named after, and those moved."""
        joining = weights.gather(1, self.moved)
        return weights.scatter_add(1, self.joins, joining), joining

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
        own = sizes
        if own is None:
            own = torch.ones(len(x), self.n_in, dtype=torch.float32, device=x.device)
        sums, kept = self._sums(own), self.kept
        new_sizes = sums[0].gather(1, kept)
        if self.prune or self.n_in == self.n_out:
            return take_tokens(x, kept), new_sizes
        weights = own if weighted else torch.ones_like(own)
        if self.dropped is not None:
            weights = weights * ~self.dropped
        if weights is not own:
            sums = self._sums(weights)
        return take_tokens(self._means(x, *sums), kept), new_sizes

    def _means(self, x: Tensor, total: Tensor, joining: Tensor) -> Tensor:
        """Every group's mean at the token it is named after: [B, N, C] in x's dtype.

        It is that token v plus w_i / W (v_i - v) for each of the others: most tokens are alone and
        are not touched, and equal ones change nothing.

        Args:
            x: [B, N, C].
            total: [B, N] sums of the weights W.
            joining: [B, N - M] weights of the tokens that give up their place.
        """
        exact, joins = torch.promote_types(x.dtype, torch.float32), self.joins
        values, named = (take_tokens(x, index) for index in (self.moved, joins))
        values = values.to(exact)
        share = joining.to(exact) / total.to(exact).gather(1, joins)
        change = (values - named).mul_(share[..., None])
        if self.keep_norm:
            return self._with_largest_norm(x.to(exact), values, change).to(x.dtype)
        if exact == x.dtype:
            return add_tokens(x, joins, change)
        # Sums of half-precision values lose bits.
        sums = torch.zeros(x.shape, dtype=exact, device=x.device)
        return x + add_tokens(sums, joins, change, fresh=True).to(x.dtype)

    def _with_largest_norm(self, x: Tensor, values: Tensor, change: Tensor) -> Tensor:
        """Means [B, N, C] scaled to the largest norm among their members."""
        joins, norms = self.joins, x.norm(dim=-1)
        largest = norms.scatter_reduce(1, joins, values.norm(dim=-1), "amax")
        alone = torch.ones_like(largest).scatter(1, joins, 0.0).bool()
        merged = add_tokens(x, joins, change)
        scaled = merged * (largest / merged.norm(dim=-1).clamp(min=1e-12))[..., None]
        # A token on its own keeps its value bit for bit.
        return torch.where(alone[..., None], x, scaled)


def _numbers(n_tokens: int, like: Tensor) -> Tensor:
    """The numbers of n tokens, [B, n] int64, for as many images as `like` [B, ...] has."""
    return torch.arange(n_tokens, device=like.device).expand(len(like), -1)


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


def add_tokens(x: Tensor, index: Tensor, values: Tensor, *, fresh: bool = False) -> Tensor:
    """Add rows [B, K, C] to those of x [B, N, C] at [B, K]; on a CPU in their order.

    `fresh`: nobody else has x, so that it may be written over.
    """
    add = Tensor.index_add_ if fresh else Tensor.index_add
    if x.shape[0] == index.shape[0] == 1:
        return add(x, 1, index[0], values)
    rows = x.reshape(-1, x.shape[-1])
    rows = add(rows, 0, _flat_rows(index, x.shape[1]), values.flatten(0, 1))
    return rows.view(x.shape)
