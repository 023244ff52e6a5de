"""What a merge is and how it is carried out.

Knows: groups of tokens, size-weighted means, sizes, source maps. Does not know: who decided the
groups and why, and nothing about models.

Axes: B images, N tokens before, M tokens after a merge, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class MergePlan:
    """A partition of N tokens into M groups, the same shape for every image of a batch.

    Attributes:
        assign: [B, N] int64, the group of every token, 0..M-1.
        kept: [B, M] int64, the token each group is named after; its place is the group's place.
        prune: the group's value is its named token alone instead of the mean. The other members
            are still booked on it, so that sizes count every patch.
        dropped: [B, N] bool, members that are booked on their group and give nothing to its mean;
            None for none. A group's named token always gives.
        keep_norm: means are scaled to the largest norm in their group (MLERP).
        blend: [M, N] float, the new tokens as fixed combinations of all old ones instead of means
            of groups (a resampling); `assign` then says whom each one mostly stands for.
    """

    assign: Tensor
    kept: Tensor
    prune: bool = False
    dropped: Tensor | None = None
    keep_norm: bool = False
    blend: Tensor | None = None
    _moves: list[tuple[Tensor, Tensor]] = field(default_factory=list, repr=False, compare=False)

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
            stays = torch.ones(batch, n_tokens, dtype=torch.bool, device=device)
            stays.scatter_(1, sources, False)
            rank = stays.cumsum(1).sub_(1)
            # Sources write into one spare slot behind the survivors: no data-dependent shape,
            # hence no host synchronisation on an accelerator.
            slot = torch.where(stays, rank, n_out)
            order = index.new_empty(batch, n_out + 1).scatter_(1, slot, index)[:, :n_out]
        else:
            places = torch.arange(n_out, device=device).expand(batch, n_out)
            rank = torch.zeros_like(index).scatter_(1, order, places)
        target = rank.gather(1, destinations)
        return cls(rank.scatter_(1, sources, target), order, prune, _moves=[(sources, target)])

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
        dropped, blend = self.dropped, self.blend
        if dropped is not None:
            dropped = torch.nn.functional.pad(dropped, (n_leading, 0))
        if blend is not None:
            blend = torch.nn.functional.pad(blend, (n_leading, 0, n_leading, 0))
            blend[:n_leading, :n_leading].fill_diagonal_(1.0)
        return MergePlan(
            _behind(self.assign, n_leading),
            _behind(self.kept, n_leading),
            self.prune,
            dropped,
            self.keep_norm,
            blend,
            [(moved + n_leading, target + n_leading) for moved, target in self._moves],
        )

    def moves(self) -> tuple[Tensor, Tensor]:
        """The tokens that give up their place, and their groups, each [B, N - M] int64."""
        if not self._moves:
            stays = torch.ones_like(self.assign).scatter_(1, self.kept, 0)
            order = stays.argsort(dim=1, descending=True, stable=True)
            moved = order[:, : self.n_in - self.n_out]
            self._moves.append((moved, self.assign.gather(1, moved)))
        return self._moves[0]

    def merge_sizes(self, sizes: Tensor | None) -> Tensor:
        """Patches behind every group: [B, N] sizes (None means all one) to [B, M] float32."""
        if sizes is None:
            sizes = torch.ones(self.assign.shape, dtype=torch.float32, device=self.assign.device)
        moved, target = self.moves()
        return sizes.gather(1, self.kept).scatter_add_(1, target, sizes.gather(1, moved))

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
        exact = torch.promote_types(x.dtype, torch.float32)
        if self.blend is not None:
            # Autocast would take the product in half precision.
            with torch.autocast(x.device.type, enabled=False):
                return (self.blend.to(exact) @ x.to(exact)).to(x.dtype), new_sizes
        if self.prune or self.n_in == self.n_out:
            return take_tokens(x, self.kept), new_sizes
        weights = sizes if weighted else None
        if self.dropped is not None:
            give = ~self.dropped
            weights = give.float() if weights is None else weights * give
        total = new_sizes if weights is sizes else self.merge_sizes(weights)
        rows, into = self._merged_rows(x, weights, total.to(exact))
        # Whole rows by number, the images of a batch behind each other, and one spare row behind
        # them: most tokens are only moved, and those that are not are written over once.
        numbers = torch.nn.functional.pad(flat_rows(self.kept, self.n_in), (0, 1))
        merged = x.reshape(-1, x.shape[-1]).index_select(0, numbers)
        merged.index_copy_(0, into, rows.to(x.dtype))
        return merged[:-1].view(len(x), self.n_out, -1), new_sizes

    def _merged_rows(
        self, x: Tensor, weights: Tensor | None, total: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The means of the groups that have more than one member.

        There is one row per moved token, and the first of a group's moved tokens leads: its row
        holds the mean. Counts that depended on the data would make an accelerator wait.

        Args:
            x: [B, N, C].
            weights: [B, N], None for all one.
            total: [B, M] sums of the weights, in the dtype to add in: sums of many
                half-precision values lose bits.

        Returns:
            rows [B (N - M), C], and the row of [B M] each goes to, B M for those that lead no
            group.
        """
        moved, target = self.moves()
        n_moved, channels = moved.shape[1], x.shape[-1]
        place = torch.arange(n_moved, device=moved.device).expand_as(moved)
        leader = torch.full_like(self.kept, n_moved).scatter_reduce_(1, target, place, "amin")
        slot = leader.gather(1, target)
        # The named token of every moved one's group, then the moved ones themselves.
        members = torch.cat([self.kept.gather(1, target), moved], 1)
        values = take_tokens(x, members).to(total.dtype)
        norms = values.norm(dim=-1) if self.keep_norm else None
        if weights is not None:
            values = values * weights.gather(1, members).to(total.dtype)[..., None]
        sums, parts = (half.reshape(-1, channels) for half in values.split(n_moved, 1))
        sums = sums.index_add(0, flat_rows(slot, n_moved), parts)
        merged = sums / total.gather(1, target).view(-1, 1)
        if norms is not None:
            # Scaled to the largest norm among the group's members.
            kept, others = norms.split(n_moved, 1)
            largest = kept.scatter_reduce(1, slot, others, "amax").view(-1, 1)
            merged = merged * (largest / merged.norm(dim=-1, keepdim=True).clamp(min=1e-12))
        rows = flat_rows(target, self.n_out)
        into = torch.where((slot == place).view(-1), rows, len(x) * self.n_out)
        return merged, into

    def unmerge(self, y: Tensor) -> Tensor:
        """Spread group values back over their tokens: [B, M, C] to [B, N, C]."""
        return take_tokens(y, self.assign)


def _behind(index: Tensor, n_leading: int) -> Tensor:
    """[B, n] numbers of tokens as they are behind `n_leading` others, and those in front."""
    moved = torch.nn.functional.pad(index + n_leading, (n_leading, 0))
    if n_leading > 1:
        moved[:, :n_leading] = torch.arange(n_leading, device=index.device)
    return moved


def flat_rows(index: Tensor, n_tokens: int) -> Tensor:
    """Token numbers [B, K] per image as row numbers [B K] of a batch laid out as [B N, C]."""
    if index.shape[0] == 1:
        return index[0]
    first = torch.arange(0, index.shape[0] * n_tokens, n_tokens, device=index.device)
    return (index + first[:, None]).reshape(-1)


def take_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Rows of every image: [B, N, C] at [B, K] to [B, K, C]; `gather`, but row by row."""
    rows = x.reshape(-1, x.shape[-1]).index_select(0, flat_rows(index, x.shape[1]))
    return rows.view(*index.shape, x.shape[-1])
