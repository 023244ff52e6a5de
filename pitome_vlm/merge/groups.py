"""Groups of cells of one image, brought to an exact number.

Handles which cell belongs to which group, how groups are merged further or divided, and how
separators are thinned out. Tiles are handled in `tiles.py`.

Axes: P cells that hold patches, n groups of them, C channels.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import torch
from torch import Tensor

from .adaptive import adapt
from .algorithm import Algorithm, make_plan
from .counts import shared_out
from .merge_pass import MergePass
from .plan import MergePlan
from .steps import falling_counts, geometric_counts


@dataclass(frozen=True)
class Groups:
    """The tokens of one image, in raster order of the cells they are named after.

    Attributes:
        features: [n, C].
        sizes: [n] float32 cells that each token stands for.
        assign: [P] int64, the token of every cell.
        kept: [n] int64, the cell every token is named after.
    """

    features: Tensor
    sizes: Tensor
    assign: Tensor
    kept: Tensor

    @property
    def n(self) -> int:
        """Tokens."""
        return len(self.kept)

    def merged(self, plan: MergePlan, image: int, features: Tensor, sizes: Tensor) -> Groups:
        """These groups after a plan over them, given what it made of features and sizes.

        Args:
            plan: over the groups of several images, [B, n].
            image: which of them this is.
            features: [m, C].
            sizes: [m].
        """
        assign, kept = plan.assign[image], plan.kept[image]
        return Groups(features, sizes, assign[self.assign], self.kept[kept])


def joined(parts: list[Groups]) -> Groups:
    """Groups of consecutive stretches of cells as those of all of them."""
    if len(parts) == 1:
        return parts[0]
    tokens, cells, assign, kept = 0, 0, [], []
    for part in parts:
        assign.append(part.assign + tokens)
        kept.append(part.kept + cells)
        tokens, cells = tokens + part.n, cells + len(part.assign)
    features = torch.cat([part.features for part in parts])
    sizes = torch.cat([part.sizes for part in parts])
    return Groups(features, sizes, torch.cat(assign), torch.cat(kept))


def group_cells(values: Tensor, labels: Tensor, anchors: Tensor, wanted: int) -> Groups:
    """Cells of one label become one token; at least `wanted` tokens in all.

    Args:
        values: [P, C] of the cells; equal within a label unless the cells were resampled.
        labels: [P] int64, any numbers.
        anchors: [P] bool, cells that their label is to be named after.
        wanted: 1..P. Where there are fewer labels, the largest are divided.
    """
    _, assign = torch.unique(labels, return_inverse=True)
    n = int(assign.max()) + 1
    if n < wanted:
        assign, n = divided(assign, wanted), wanted
    cells = torch.arange(len(labels), device=labels.device)
    # The anchor where it is among the cells, otherwise the first cell.
    rank = torch.where(anchors, cells, cells + len(labels))
    empty = rank.new_full((n,), 2 * len(labels))
    kept, order = (empty.scatter_reduce(0, assign, rank, "amin") % len(labels)).sort()
    assign = torch.empty_like(order).scatter(0, order, cells[:n])[assign]
    plan = MergePlan.from_groups(assign[None], kept[None])
    features, sizes = plan.apply(values[None])
    return Groups(features[0], sizes[0], assign, kept)


def divided(assign: Tensor, wanted: int) -> Tensor:
    """Groups [P] of which the largest are divided, in raster order, until there are `wanted`."""
    sizes = torch.bincount(assign)
    counts: list[int] = sizes.tolist()
    parts = [1] * len(counts)
    queue = [(-float(size), group) for group, size in enumerate(counts)]
    heapq.heapify(queue)
    for _ in range(wanted - len(counts)):
        _, group = queue[0]
        parts[group] += 1
        heapq.heapreplace(queue, (-counts[group] / parts[group], group))
    per_group = torch.tensor(parts, device=assign.device)
    order = assign.argsort(stable=True)
    place = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
    place = place - (sizes.cumsum(0) - sizes)[assign]
    first = per_group.cumsum(0) - per_group
    return first[assign] + place * per_group[assign] // sizes[assign]


def merge_further(groups: list[Groups], wanted: list[int], merge_pass: MergePass) -> list[Groups]:
    """The groups of each image merged to its count; images of the same counts go together."""
    found = list(groups)
    alike: dict[tuple[int, int], list[int]] = {}
    for index, (own, count) in enumerate(zip(groups, wanted, strict=True)):
        alike.setdefault((own.n, count), []).append(index)
    algorithm = merge_pass.finisher or merge_pass.algorithm
    for (n, count), members in alike.items():
        if n == count:
            continue
        steps = merge_pass.config.projector_steps or 1
        for step, target in enumerate(geometric_counts(n, steps, count)):
            together = _merged(
                [found[index] for index in members], target, step, algorithm, merge_pass
            )
            for index, one in zip(members, together, strict=True):
                found[index] = one
    return found


def _merged(
    groups: list[Groups], target: int, step: int, algorithm: Algorithm, merge_pass: MergePass
) -> list[Groups]:
    """One step of images that have the same number of groups."""
    features = torch.stack([one.features for one in groups])
    sizes = torch.stack([one.sizes for one in groups])
    context = merge_pass.projector_context(step)
    plan = make_plan(algorithm, features, target, ctx=context, sizes=sizes)
    merged, grown = plan.apply(features, sizes, weighted=merge_pass.config.weighted)
    return [
        one.merged(plan, index, merged[index], grown[index]) for index, one in enumerate(groups)
    ]


def merge_on_grids(
    groups: Groups, wanted: int, grids: list[tuple[int, int]], merge_pass: MergePass
) -> Groups:
    """Groups of single cells merged by an algorithm that follows the grid, grid by grid.

    Args:
        groups: one per cell.
        wanted: tokens in all; every grid gets its share, and neighbouring grids share a token
            where there is less than one for each.
        grids: (rows, columns) of the image's grids, in the order of their cells.
        merge_pass: the settings.
    """
    lengths = [rows * columns for rows, columns in grids]
    counts = shared_out(max(wanted, len(grids)), lengths)
    assign, kept, start, n = [], [], 0, 0
    for grid, length, count in zip(grids, lengths, counts, strict=True):
        context = merge_pass.projector_context(0, grid=grid)
        part = groups.features[None, :length]
        plan = make_plan(merge_pass.algorithm, part, count, ctx=context)
        assign.append(plan.assign + n)
        kept.append(plan.kept + start)
        start, n = start + length, n + count
    whole = MergePlan.from_groups(torch.cat(assign, 1), torch.cat(kept, 1))
    if wanted < n:
        shared = torch.arange(n, device=whole.kept.device) * wanted // n
        whole = whole.then(MergePlan.from_assignment(shared[None], wanted))
    features, sizes = whole.apply(groups.features[None], groups.sizes[None])
    return groups.merged(whole, 0, features[0], sizes[0])


def adapted(groups: Groups, fewest: int, merge_pass: MergePass) -> Groups:
    """keep="auto": the groups of one image merged as far as its own redundancy allows.

    `groups` are at the largest count, `fewest` is the smallest.
    """
    steps = merge_pass.config.projector_steps or 1
    found = adapt(
        groups.features[None],
        groups.sizes[None],
        falling_counts(groups.n, min(fewest, groups.n)),
        merge_pass.config.quality,
        algorithm=merge_pass.finisher or merge_pass.algorithm,
        ctx=merge_pass.projector_context(steps),
        weighted=merge_pass.config.weighted,
    )[0]
    assign = found.assign[groups.assign]
    sizes = torch.bincount(assign, minlength=len(found.kept)).float()
    return Groups(found.features, sizes, assign, groups.kept[found.kept])


def thinned(values: Tensor, wanted: int) -> Groups:
    """Separators [R, C] (all alike) of which `wanted` stay, each for its share of the rows."""
    cells = torch.arange(len(values), device=values.device)
    assign = cells * wanted // max(1, len(values))
    sizes = torch.bincount(assign, minlength=wanted)
    # Named after its middle row.
    kept = sizes.cumsum(0) - sizes + (sizes - 1) // 2
    return Groups(values[kept], sizes.float(), assign, kept)
