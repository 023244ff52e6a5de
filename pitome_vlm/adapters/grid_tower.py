"""Merging inside towers whose projector mixes neighbouring patches.

Poolings and pixel shuffles read whole grids, so the last layer that is read hands every patch the
value of its group, and groups end with the tower. So does every other layer whose states are read;
the layer after it takes the value of a group from the patch that it is named after.

From the first merge on the patches of all images are packed into one sequence of segments, whatever
rows the tower has: what fills rows up to one length is left out.

Axes: R places in the tower's rows, U patches (and class tokens) of all images, M of them after
merges, C channels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from ..merge.counts import Footprint
from ..merge.merge_pass import MergePass
from ..merge.schedule import Schedule
from ..merge.segments import Frame
from ..merge.tiles import PackedItem
from .grids import Grid
from .inner_tower import Comparison, Reading, TowerKind, own_weights, weights
from .layer_parts import LayerParts, attention_of, mlp_of, parts_of
from .merged_layer import Heads, LayerKernels, merged_layer
from .tower import (
    MergingLayer,
    encoding,
    find_encoder_layers,
    install_tower,
    project,
    project_out,
    uninstall_tower,
)
from .tower_tokens import has_class_token
from .unit_attention import Segmented, attend_within, attention_by_unit
from .unit_tower import UnitPass


@dataclass
class GridPass(UnitPass):
    """A pass over patches of images in the rows of a tower, which get all of them back.

    Attributes:
        whole_after: layers after which every patch is there.
        rows: [U] int64, which places of the rows hold something; None for all.
    """

    whole_after: frozenset[int] = frozenset()
    rows: Tensor | None = None
    _shape: torch.Size | None = None

    def entering(self, layer: int, hidden: Tensor) -> Tensor:
        """What is merged so far, [1, M, C], of the states that a layer is given.

        Args:
            layer: from the first one that merges on.
            hidden: the tower's rows [..., C] where the layer before left them whole.
        """
        first = min(self._after)
        if layer != first and layer - 1 not in self.whole_after:
            return hidden
        self._shape = hidden.shape
        flat = hidden.flatten(0, -2)
        if self.rows is not None:
            self.rows = self.rows.to(flat.device)
            flat = flat[self.rows]
        expected = sum(self.lengths_before(first).frames)
        if len(flat) != expected:
            raise RuntimeError(
                f"the vision tower has {len(flat)} patches and class tokens where {expected} were "
                "expected; pass pixels of the size that the processor makes"
            )
        named = self.named_before(layer)
        return flat[None] if named is None else flat[None, named]

    def leaving(self, layer: int, hidden: Tensor) -> Tensor:
        """What a layer hands on: the rows of the tower where its states are read.

        Args:
            layer: its number.
            hidden: [1, M, C].
        """
        if layer not in self.whole_after:
            return hidden
        assert self._shape is not None
        spread = hidden[0, self.source_before(layer + 1)]
        if self.rows is None:
            return spread.view(self._shape)
        rows = spread.new_zeros(self._shape[:-1].numel(), spread.shape[-1])
        return rows.index_copy(0, self.rows, spread).view(self._shape)

    def kernels(self, names: LayerParts, layer: int, hidden: Tensor) -> LayerKernels:
        """How the attention of a layer is run on what enters it."""
        segments = self.segments_before(layer, False, hidden.device)
        own = LayerKernels(
            functools.partial(project, names),
            functools.partial(_attend, names, segments),
            received=functools.partial(received_within, segments),
        )
        if not names.rotary:
            return own
        turn = functools.partial(_turned, names.rotary, *self.angles_before(layer, hidden))
        return dataclasses.replace(own, turn=turn)


class GridLayer(MergingLayer):
    """Mixin before the class of an encoder layer of a grid tower."""

    def _pitome_merged(self, hidden: Tensor, merge_pass: MergePass, angles: Any) -> Tensor:
        del angles  # of the patches in their rows; here they follow from the places of groups
        layer, names = self._pitome_layer, self._pitome_parts
        assert isinstance(merge_pass, GridPass)
        hidden = merge_pass.entering(layer, hidden)
        kernels = merge_pass.kernels(names, layer, hidden)
        hidden = merged_layer(self, layer, hidden, merge_pass, kernels, names)
        return merge_pass.leaving(layer, hidden)


def _attend(
    names: LayerParts, segments: Segmented, attention: Any, heads: Heads, bias: Tensor | None
) -> Tensor:
    """Attention within images: heads [1, H, M, D] and bias [1, 1, 1, M] to [1, M, C]."""
    scale, dropout = names.scale_of(attention), names.dropout_of(attention)
    flat = _flat(heads)
    found = attend_within(attention, flat, segments, _row(bias), scale, dropout)
    return project_out(names, attention, found[None])


def received_within(
    segments: Segmented, query: Tensor, key: Tensor, bias: Tensor | None, scale: float, _: bool
) -> Tensor:
    """How much attention every token gets within its image, [1, M] float32."""
    # Heads of queries may share one of keys.
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    return attention_by_unit(_flat((query, key, key)), segments, _row(bias), scale, 1)


def _flat(heads: Heads) -> Heads:
    query, key, value = (part[0].transpose(0, 1) for part in heads)
    return query, key, value


def _row(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.flatten()


def _turned(axes: int, cos: Tensor, sin: Tensor, heads: Heads) -> Heads:
    """Queries and keys [1, H, M, D] turned to their places, [M, D]."""
    query, key, value = heads
    return rotated(query, axes, cos, sin), rotated(key, axes, cos, sin), value


def rotated(x: Tensor, axes: int, cos: Tensor, sin: Tensor) -> Tensor:
    """[..., D] turned by angles, [..., D], of which every axis has a part of the channels."""
    parts = []
    for part in x.chunk(axes, -1):
        first, second = part.chunk(2, -1)
        parts += [-second, first]
    return x * cos + torch.cat(parts, -1) * sin


class _ColumnFirst:
    """A rotary embedding that takes columns before rows, and images of them."""

    def __init__(self, own: Any) -> None:
        self.own = own

    def __call__(self, hidden: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        return self.forward(hidden, places)

    def forward(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.own(hidden, position_ids.flip(-1)[None])
        return cos[0], sin[0]


class GridTower(TowerKind):
    """Towers of SigLIP's, InternVL's, AIMv2's, Pixtral's and Gemma 4's layers."""

    spread = True

    @override
    def layers(self, tower: nn.Module) -> int:
        try:
            layers = find_encoder_layers(tower, rotary=True)[0]
        except TypeError:
            return 0
        return 0 if _is_rotary(layers) and _rotary_of(tower) is None else len(layers)

    @override
    def install(self, tower: nn.Module) -> None:
        install_tower(tower, GridLayer, rotary=True)

    @override
    def uninstall(self, tower: nn.Module) -> None:
        uninstall_tower(tower)

    @override
    @contextlib.contextmanager
    def encoding(
        self,
        tower: nn.Module,
        merge_pass: MergePass,
        items: Sequence[PackedItem],
        reading: Reading,
    ) -> Iterator[MergePass]:
        if merge_pass.schedule.tower:
            merge_pass = grid_pass(tower, merge_pass, items, reading)
        with encoding(tower, merge_pass):
            yield merge_pass

    @override
    def flops(
        self,
        tower: nn.Module,
        reading: Reading,
        footprint: Footprint,
        schedule: Schedule | None,
    ) -> int | None:
        layers: list[Any] = list(find_encoder_layers(tower, rotary=True)[0])
        lengths = _lengths(tower, reading, schedule)
        inside = schedule is None or not schedule.after_layer
        total, inner = 0, {module for layer in layers for module in layer.modules()}
        for layer, entering, leaving in zip(layers, lengths, lengths[1:], strict=False):
            attention = attention_of(layer)
            total += weights(attention) * entering + 2 * entering**2 * _width(attention)
            total += sum(map(weights, mlp_of(layer))) * (leaving if inside else entering)
        around = (module for module in tower.modules() if module not in inner)
        return 2 * (total + sum(map(own_weights, around)) * lengths[0])

    @override
    def comparisons(
        self, tower: nn.Module, reading: Reading, footprint: Footprint, schedule: Schedule
    ) -> list[Comparison]:
        attention: Any = attention_of(find_encoder_layers(tower, rotary=True)[0][0])
        lengths, special = _lengths(tower, reading, schedule), int(has_class_token(tower))
        widths = attention.head_dim, _width(attention)
        return [
            Comparison(
                *(layer, lengths[layer] - special, lengths[layer + 1] - special, 1, *widths),
                ranking=2 * lengths[layer] ** 2 * widths[1],
            )
            for layer, _ in schedule.tower
        ]


def _width(attention: Any) -> int:
    return int(attention.config.num_attention_heads * attention.head_dim)


def _lengths(tower: nn.Module, reading: Reading, schedule: Schedule | None) -> list[int]:
    """Patches and class tokens of one image before the first layer and after each that is run."""
    own, n_layers = (
        _frame(tower, reading.patches[0]),
        len(find_encoder_layers(tower, rotary=True)[0]),
    )
    lengths, counts = [sum(own)], {}
    if schedule is not None and schedule.tower:
        counts, n_layers = dict(schedule.tower), max(reading.depths)
    for layer in range(n_layers):
        left = lengths[-1]
        if schedule is not None and layer in counts:
            left = -(-lengths[0] * counts[layer] // schedule.n_tokens)
        lengths.append(left)
    return lengths


def _frame(tower: nn.Module, patches: Grid) -> tuple[int, ...]:
    """What of an image or frame is merged on its own: a class token, patches."""
    return (*(1,) * has_class_token(tower), math.prod(patches[1:]))


def _is_rotary(layers: nn.ModuleList) -> bool:
    parts = parts_of(layers[0])
    return parts is not None and bool(parts.rotary)


def _rotary_of(tower: nn.Module) -> Any:
    """The rotary embedding of any places of a tower; None where there is none, or only a table."""
    for module in tower.modules():
        pixtral: Any = getattr(module, "patch_positional_embedding", None)
        gemma: Any = getattr(module, "rotary_emb", None)
        paddle: Any = getattr(module, "rotary_pos_emb", None)
        if pixtral is not None:
            return pixtral if pixtral.inv_freq.dim() == 1 else None
        if gemma is not None:
            return _ColumnFirst(gemma)
        if paddle is not None:
            return paddle
    return None


def grid_pass(
    tower: nn.Module, merge_pass: MergePass, items: Sequence[PackedItem], reading: Reading
) -> GridPass:
    """A pass over the patches of images and frames, for a tower that merges.

    Args:
        tower: of transformers, or with the same embeddings.
        merge_pass: what is asked for.
        items: the images (or tiles).
        reading: how they are read.
    """
    frames: list[Frame] = []
    places, rows = [], []
    for item, own in zip(items, reading.patches, strict=True):
        count = merge_pass.count(item.footprint)
        grid = torch.cartesian_prod(*map(torch.arange, own[1:])).float()
        for _ in range(own[0]):
            rows.append(torch.arange(len(grid)) + reading.row * len(frames))
            frames.append(Frame(_frame(tower, own), count))
            places.append(grid)
    first = merge_pass.schedule.tower[0][0]
    return GridPass.of(
        merge_pass,
        frames=tuple(frames),
        places=torch.cat(places)[None],
        patches=1,
        rotary=_rotary_of(tower),
        whole_after=frozenset(depth - 1 for depth in reading.depths if depth > first),
        rows=torch.cat(rows) if reading.row else None,
    )
