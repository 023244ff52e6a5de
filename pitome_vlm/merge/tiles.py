"""Images of several tiles: from groups per tile to an exact number of tokens per image.

A model that cuts an image into tiles packs the tokens of all tiles into one sequence: it drops
those that lie in padding, may resample the rest and puts newline tokens between rows. Merging is
done per tile, before that. So the groups of a tile are spread back over its grid, the model's own
function (which the adapter hands in) packs them, and what belongs to one group is joined again.
Which token of the packed sequence came from where is learnt by sending coordinates through the same
function.

Then every image is brought to its exact count: groups that are too many are merged further by
the algorithm, and where too few are left (some lived in padding alone) the largest are divided
again, into tokens of the same value that share the size (with size bias they weigh the same).
A video is brought to its count window by window, each of one or several whole frames: what comes
out of a window depends on its own frames alone.

Axes: t tiles of an image, N tokens of a tile before merging, M after, L cells of the packed
sequence, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .counts import Footprint, TokenCount, newline_share, shared_out
from .groups import Groups, adapted, group_cells, joined, merge_further, merge_on_grids, thinned
from .merge_pass import MergePass
from .tokens import VisualTokens

# Tiles [t, N, C] of every image and a newline [C] to the packed sequence [L, C] of every image.
Pack = Callable[[list[Tensor], Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class PackedItem:
    """One image that is packed from tiles.

    Attributes:
        footprint: its counts.
        canvases: one [H, W] int64 tensor for every plane the tiles are laid out on (the overview
            tile, the tiles side by side, or the frames of a video): the cell that stands there,
            tile x N + token. Tokens are never resampled across two planes.
        frame_of: the frame every canvas belongs to, rising; None for an image.
    """

    footprint: Footprint
    canvases: tuple[Tensor, ...]
    frame_of: tuple[int, ...] | None = None

    def windows(self, planes: Tensor, frames_together: int) -> list[Tensor]:
        """Which cells are merged with each other: [L] bool for every window, in packed order.

        Args:
            planes: [L] int64, the canvas of every cell.
            frames_together: frames of a window; the last one may have fewer.
        """
        if self.frame_of is None:
            return [torch.ones_like(planes, dtype=torch.bool)]
        frames = torch.tensor(self.frame_of, device=planes.device)[planes]
        own = frames // frames_together
        return [own == window for window in range(len(self.footprint.windows(frames_together)))]


@dataclass(frozen=True)
class Layout:
    """Where the packed sequence of an image came from.

    Attributes:
        cells: [L] int64, the cell nearest to each place, -1 for a newline.
        planes: [L] int64, the canvas it is on, -1 for a newline.
        columns: [L] float32, its column on the canvas.
    """

    cells: Tensor
    planes: Tensor
    columns: Tensor

    def part(self, which: Tensor) -> Layout:
        """The layout of some of the places, [L] bool."""
        return Layout(self.cells[which], self.planes[which], self.columns[which])

    def grids(self) -> list[tuple[int, int]]:
        """(rows, columns) of what is left of every canvas that is not gone, in packed order."""
        found = []
        real = self.planes >= 0
        planes, columns = self.planes[real], self.columns[real]
        for plane in torch.unique_consecutive(planes).tolist():
            own = columns[planes == plane]
            # A row ends where columns stop rising.
            ends = (own[1:] <= own[:-1]).nonzero()[:, 0]
            width = int(ends[0]) + 1 if len(ends) else len(own)
            found.append((len(own) // width, width))
        return found


@torch.no_grad()
def learn_layouts(
    items: Sequence[PackedItem], pack: Pack, tokens: int, device: torch.device
) -> list[Layout]:
    """The layout of every image, by sending coordinates through the model's own function.

    Linear functions survive bilinear resampling, so (plane, row, column) come out as the
    coordinates of each place of the packed sequence.

    Args:
        items: the images.
        pack: the model's function.
        tokens: N.
        device: of the result.
    """
    probes = []
    for item in items:
        probe = torch.zeros(item.footprint.tiles * tokens, 3, device=device)
        for plane, canvas in enumerate(item.canvases):
            rows, columns = (torch.arange(n, device=device) for n in canvas.shape)
            y, x = torch.meshgrid(rows, columns, indexing="ij")
            places = torch.stack([torch.full_like(y, plane), y, x], -1).flatten(0, 1)
            probe[canvas.flatten().to(device)] = places.float()
        probes.append(probe.view(item.footprint.tiles, tokens, 3))
    newline = torch.tensor([-1.0, 0.0, 0.0], device=device)
    return [
        _layout(item, places) for item, places in zip(items, pack(probes, newline), strict=True)
    ]


def _layout(item: PackedItem, places: Tensor) -> Layout:
    planes, rows, columns = places.round().long().unbind(-1)
    cells = torch.full_like(planes, -1)
    for plane, canvas in enumerate(item.canvases):
        own = planes == plane
        cells[own] = canvas.to(cells.device)[rows[own], columns[own]]
    return Layout(cells, planes, places[:, 2])


def merge_packed(
    tiles: Tensor,
    items: Sequence[PackedItem],
    pack: Pack,
    newline: Tensor,
    merge_pass: MergePass,
) -> VisualTokens:
    """The visual tokens of images whose tiles went through tower and projector.

    Args:
        tiles: [sum of t, M, C], the tiles of all images in order.
        items: the images.
        pack: the model's function.
        newline: [C], the model's separator.
        merge_pass: what the tower merged and what is asked for.

    Returns:
        Tokens whose input tokens are the cells of the packed sequence.

    Raises:
        RuntimeError: a packed sequence has another length than its footprint says.
    """
    assign, anchors = merge_pass.tower_map(len(tiles), tiles.device)
    n_tokens, merged = assign.shape[1], tiles.shape[1]
    spread = tiles
    if merge_pass.plans:
        spread = tiles.gather(1, assign[..., None].expand(-1, -1, tiles.shape[-1]))
    lengths = [item.footprint.tiles for item in items]
    packed = pack(list(torch.split(spread, lengths)), newline)
    layouts = learn_layouts(items, pack, n_tokens, tiles.device)
    counts = [merge_pass.count(item.footprint) for item in items]
    first = torch.arange(len(tiles), device=tiles.device)[:, None]
    # Numbered through over all tiles of the batch; only equality counts.
    labels, named = assign + first * merged, anchors + first * n_tokens
    start, windows, separators = 0, [], []
    for item, values, layout, count in zip(items, packed, layouts, counts, strict=True):
        _check_length(item.footprint, layout, len(values))
        real = layout.cells >= 0
        cells = layout.cells[real] + start * n_tokens
        own = labels.flatten()[cells]
        cut = _Cells(values[real], own, named.flatten()[own] == cells, layout.part(real))
        lines = thinned(values[~real], newline_share(item.footprint, count.out))
        windows.append(cut.windows(item, count, lines.n, merge_pass))
        separators.append(lines)
        start += item.footprint.tiles
    found = iter(_to_counts([one for own in windows for one in own], merge_pass))
    patches = [joined([next(found) for _ in own]) for own in windows]
    return _tokens(items, layouts, patches, separators)


@dataclass(frozen=True)
class CellGroups:
    """What a tower made of the cells of an image.

    Attributes:
        labels: [L] int64, the group of every cell; only equality counts.
        anchors: [L] bool, the cell that each group is named after.
    """

    labels: Tensor
    anchors: Tensor


def merge_grids(
    features: Sequence[Tensor],
    items: Sequence[PackedItem],
    merge_pass: MergePass,
    groups: Sequence[CellGroups] | None = None,
) -> VisualTokens:
    """The visual tokens of images (or videos) that need no packing: a cell is a token.

    Args:
        features: of every image [L, C].
        items: the images; their canvases hold the tokens in order, without separators.
        merge_pass: what is asked for.
        groups: what the tower made of every image, all of whose cells have their group's value;
            None for nothing.
    """
    layouts, windows, separators = [], [], []
    for index, (item, values) in enumerate(zip(items, features, strict=True)):
        layout = _plain_layout(item, values.device)
        labels, anchors = layout.cells, torch.ones_like(layout.cells, dtype=torch.bool)
        if groups is not None:
            labels, anchors = groups[index].labels, groups[index].anchors
        cut = _Cells(values, labels, anchors, layout)
        windows.append(cut.windows(item, merge_pass.count(item.footprint), 0, merge_pass))
        layouts.append(layout)
        separators.append(thinned(values[:0], 0))
    found = iter(_to_counts([one for own in windows for one in own], merge_pass))
    patches = [joined([next(found) for _ in own]) for own in windows]
    return _tokens(items, layouts, patches, separators)


def _plain_layout(item: PackedItem, device: torch.device) -> Layout:
    cells = torch.cat([canvas.flatten() for canvas in item.canvases])
    planes = [torch.full_like(canvas, n).flatten() for n, canvas in enumerate(item.canvases)]
    columns = [
        torch.arange(canvas.shape[1]).repeat(canvas.shape[0]).float() for canvas in item.canvases
    ]
    return Layout(*(part.to(device) for part in (cells, torch.cat(planes), torch.cat(columns))))


@dataclass(frozen=True)
class _Window:
    """Groups that are merged with each other, and how many are to be left.

    Attributes:
        groups: at least `wanted` of them.
        wanted: tokens; the most, where every image has a count of its own.
        fewest: tokens, where every image has a count of its own.
        layout: of the cells of the groups.
    """

    groups: Groups
    wanted: int
    fewest: int
    layout: Layout


@dataclass(frozen=True)
class _Cells:
    """The cells of a packed image that hold patches.

    Attributes:
        values: [P, C].
        labels: [P] int64, the group of every cell.
        anchors: [P] bool, cells that their group is named after.
        layout: of these cells.
    """

    values: Tensor
    labels: Tensor
    anchors: Tensor
    layout: Layout

    def windows(
        self, item: PackedItem, count: TokenCount, n_newlines: int, merge_pass: MergePass
    ) -> list[_Window]:
        """The groups of every window, each with its share of the image's tokens."""
        masks = item.windows(self.layout.planes, merge_pass.config.frames_together)
        lengths = [int(mask.sum()) for mask in masks]
        wanted = shared_out(count.out - n_newlines, lengths)
        least = count.out if count.fewest is None else count.fewest
        fewest = shared_out(max(len(lengths), least - n_newlines), lengths)
        return [
            _Window(
                group_cells(self.values[mask], self.labels[mask], self.anchors[mask], most),
                most,
                min(most, less),
                self.layout.part(mask),
            )
            for mask, most, less in zip(masks, wanted, fewest, strict=True)
        ]


def _to_counts(windows: list[_Window], merge_pass: MergePass) -> list[Groups]:
    """The groups of every window merged further until it has its count."""
    if merge_pass.algorithm.needs_grid:
        return [
            merge_on_grids(one.groups, one.wanted, one.layout.grids(), merge_pass)
            for one in windows
        ]
    wanted = [one.wanted for one in windows]
    merged = merge_further([one.groups for one in windows], wanted, merge_pass)
    if not merge_pass.config.is_adaptive:
        return merged
    return [adapted(own, one.fewest, merge_pass) for own, one in zip(merged, windows, strict=True)]


def _check_length(footprint: Footprint, layout: Layout, length: int) -> None:
    newlines = int((layout.cells < 0).sum())
    if (length, newlines) != (footprint.full, footprint.newlines):
        raise RuntimeError(
            f"the model packed {length} visual tokens ({newlines} of them newlines) where "
            f"{footprint.full} ({footprint.newlines}) were expected; image_sizes that do not "
            "belong to pixel_values are the usual reason"
        )


def _tokens(
    items: Sequence[PackedItem],
    layouts: list[Layout],
    patches: list[Groups],
    separators: list[Groups],
) -> VisualTokens:
    """Patches and separators of every image in the order of the packed sequence."""
    features, source_maps, anchors = [], [], []
    for layout, own, lines in zip(layouts, patches, separators, strict=True):
        real = layout.cells >= 0
        index = torch.arange(len(real), device=real.device)
        places = torch.cat([index[real][own.kept], index[~real][lines.kept]])
        kept, order = places.sort()
        rank = torch.empty_like(order).scatter(0, order, index[: len(order)])
        source = torch.empty_like(index)
        source[real] = rank[own.assign]
        source[~real] = rank[lines.assign + own.n]
        features.append(torch.cat([own.features, lines.features])[order])
        source_maps.append(source)
        anchors.append(kept)
    return VisualTokens(features, source_maps, [item.footprint.full for item in items], anchors)
