"""What a merge is and how it is carried out.

Handles groups of tokens, size-weighted means, sizes and source maps. Who decided the groups and why
is the business of the algorithms.

Axes: B images, N tokens before, M tokens after a merge, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class MergePlan:
    """A partition of N tokens into M groups, the same shape for every image of a batch.

    Made by `from_pairs`, `from_groups`, `from_assignment` or `identity`; all tensors are int64 and
    computed without reading a value back from the device, what is derived from `named` once and
    only where it is asked for: a merge on a GPU costs as much as the kernels it launches.

    Attributes:
        named: [B, N], the token that every token's group is named after, which is a member of it.
        n_out: M, tokens after.
        ordered: [B, M], the tokens that groups are named after in the order in which they are to
            come out; None for raster order.
        prune: the group's value is its named token alone instead of the mean. The other members
            are still counted in its size, so that sizes add up to all patches.
        dropped: [B, N] bool, members that count in their group's size and give nothing to its
            mean; None for none. A group's named token always gives.
        keep_norm: means are scaled to the largest norm in their group (MLERP).
        order: [B, M], all groups in the order in which the next plan is to take them
            (`MergeContext.order`); None for the one they have.
        moved: [B, N - M], the tokens that give up their place in the order in which they are added
            to their groups; None for raster order.
    """

    named: Tensor
    n_out: int
    ordered: Tensor | None = None
    prune: bool = False
    dropped: Tensor | None = None
    keep_norm: bool = False
    order: Tensor | None = None
    moved: Tensor | None = None
    _known: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    # `functools.cached_property` takes a lock, which torch.compile cannot trace.
    def _once(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        if name not in self._known:
            self._known[name] = make()
        return self._known[name]

    @property
    def n_in(self) -> int:
        """N, tokens before."""
        return self.named.shape[1]

    @property
    def _index(self) -> Tensor:
        return self._once("index", lambda: _raster(self.named))

    @property
    def _places(self) -> Tensor:
        """[B, N]: the tokens that groups are named after, then all others in raster order."""
        return self._once("places", self._sorted)

    def _sorted(self) -> Tensor:
        # A stable sort brings those that stay to the front: no data-dependent shape, hence no
        # host synchronisation on an accelerator.
        gone = (self.named != self._index).view(torch.uint8)
        places = gone.argsort(dim=1, stable=True)
        if self.ordered is not None:
            places = torch.cat([self.ordered, places[:, self.n_out :]], 1)
        return places

    @property
    def kept(self) -> Tensor:
        """[B, M], the token each group is named after; its place is the group's place."""
        return self._places[:, : self.n_out]

    @property
    def assign(self) -> Tensor:
        """[B, N], the group of every token, 0..M-1."""
        return self._once("assign", self._assigned)

    def _assigned(self) -> Tensor:
        group = torch.empty_like(self.named)
        group = group.scatter_(1, self.kept, self._index[:, : self.n_out])
        return group.gather(1, self.named)

    @property
    def _moved(self) -> Tensor:
        return self._places[:, self.n_out :] if self.moved is None else self.moved

    @property
    def _target(self) -> Tensor:
        """[B, N - M], the group of every token that gives up its place."""
        return self._once("target", lambda: self.assign.gather(1, self._moved))

    @classmethod
    def identity(cls, keys: Tensor) -> MergePlan:
        """Every token its own group, for keys [B, N, ...]."""
        return cls(_raster(keys), keys.shape[1])

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
        itself = torch.arange(n_tokens, device=sources.device).expand(len(sources), -1)
        named = itself.scatter(1, sources, destinations)
        return cls(named, n_tokens - sources.shape[1], order, prune, moved=sources)

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
        return cls(named, kept.shape[1], kept, prune, dropped, keep_norm)

    @classmethod
    def from_assignment(cls, assign: Tensor, n_out: int) -> MergePlan:
        """Groups given directly; each is named after its first member.

        Args:
            assign: [B, N] int64 with every value of 0..n_out-1 present in every row.
            n_out: M.
        """
        batch, n_tokens = assign.shape
        first = torch.full((batch, n_out), n_tokens, dtype=torch.int64, device=assign.device)
        return cls.from_groups(assign, first.scatter_reduce(1, assign, _raster(assign), "amin"))

    def taken_apart(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a plan is made of and what `apply` derives from it, for `put_together`."""
        _ = self._target
        own = {item.name: getattr(self, item.name) for item in fields(self) if item.init}
        return own, {**self._known, "index": self._index}

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
        return MergePlan(
            self.kept.gather(1, later.named).gather(1, self.assign),
            later.n_out,
            ordered,
            self.prune or later.prune,
            dropped,
            self.keep_norm or later.keep_norm,
            later.order,
        )

    def with_leading(self, n_leading: int) -> MergePlan:
        """The same plan with `n_leading` untouched tokens (CLS) before its own."""
        if n_leading == 0:
            return self
        device, whole = self.named.device, self.n_in + n_leading
        index = torch.arange(whole, device=device).expand(len(self.named), -1)
        leading, dropped = index[:, :n_leading], self.dropped
        if dropped is not None:
            dropped = torch.nn.functional.pad(dropped, (n_leading, 0))

        def moved_on(index: Tensor | None) -> Tensor | None:
            return None if index is None else torch.cat([leading, index + n_leading], 1)

        plan = MergePlan(
            torch.cat([leading, self.named + n_leading], 1),
            self.n_out + n_leading,
            moved_on(self.ordered),
            self.prune,
            dropped,
            self.keep_norm,
            moved_on(self.order),
            None if self.moved is None else self.moved + n_leading,
        )
        plan._known["index"] = index
        return plan

    def _sums(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [B, N] summed over every group [B, M], and those that were added [B, N - M]."""
        if self.moved is None:
            weights = weights.gather(1, self._places)
            own, joining = weights[:, : self.n_out], weights[:, self.n_out :]
        else:
            own, joining = weights.gather(1, self.kept), weights.gather(1, self.moved)
        return own.scatter_add(1, self._target, joining), joining

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
        own = torch.ones_like(self.named, dtype=torch.float32) if sizes is None else sizes
        sums = self._sums(own)
        new_sizes = sums[0]
        if self.prune or self.n_in == self.n_out:
            return take_tokens(x, self.kept), new_sizes
        weights = own if weighted else torch.ones_like(own)
        if self.dropped is not None:
            weights = weights * ~self.dropped
        if weights is not own:
            sums = self._sums(weights)
        return self._means(x, *sums), new_sizes

    def _means(self, x: Tensor, total: Tensor, joining: Tensor) -> Tensor:
        """Every group's mean, [B, M, C] in x's dtype.

        It is the group's named token v plus w_i / W (v_i - v) for each of the others: most tokens
        are alone and are not touched, and equal ones change nothing.

        Args:
            x: [B, N, C].
            total: [B, M] sums of the weights W.
            joining: [B, N - M] weights of the tokens that give up their place.
        """
        exact, target = torch.promote_types(x.dtype, torch.float32), self._target
        named, values = take_tokens(x, self.kept), take_tokens(x, self._moved).to(exact)
        share = joining.to(exact) / total.to(exact).gather(1, target)
        change = (values - take_tokens(named, target)).mul_(share[..., None])
        if self.keep_norm:
            return self._with_largest_norm(values, named.to(exact), change).to(x.dtype)
        if exact == x.dtype:
            return add_tokens(named, target, change)
        # Sums of half-precision values lose bits.
        sums = torch.zeros_like(named, dtype=exact)
        return named.add_(add_tokens(sums, target, change).to(x.dtype))

    def _with_largest_norm(self, values: Tensor, named: Tensor, change: Tensor) -> Tensor:
        """Means [B, M, C] scaled to the largest norm among their members."""
        target = self._target
        norms = values.norm(dim=-1)
        largest = named.norm(dim=-1).scatter_reduce(1, target, norms, "amax")
        alone = torch.ones_like(largest).scatter(1, target, 0.0).bool()
        merged = add_tokens(named.clone(), target, change)
        scaled = merged * (largest / merged.norm(dim=-1).clamp(min=1e-12))[..., None]
        # A token on its own keeps its value bit for bit.
        return torch.where(alone[..., None], named, scaled)


def _raster(like: Tensor) -> Tensor:
    """The numbers of all tokens, [B, N] int64, for a tensor [B, N, ...]."""
    return torch.arange(like.shape[1], device=like.device).expand(like.shape[0], -1)


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
