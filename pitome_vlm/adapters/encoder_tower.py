"""Merging inside an encoder whose output has to keep its length.

The last layer hands every patch the value of its group, so that whatever reads the output (mean
pooling, an attention pooling head, cross-attention, a Q-Former) finds as many copies of it as it
stands for.

Axes: B images, N tokens before, M tokens after merges, C channels.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from typing_extensions import override

from ..merge.merge_pass import MergePass
from ..merge.plan import take_tokens
from .grid_tower import rotated
from .merged_layer import Heads, merged_layer
from .tower import MergingLayer, kernels_of


@dataclass
class EncoderPass(MergePass):
    """A pass through an encoder.

    Attributes:
        short: the output keeps merged tokens instead of handing their values back.
    """

    short: bool = False

    @classmethod
    def of(cls, merge_pass: MergePass, *, short: bool = False) -> Self:
        """A fresh pass as an encoder needs it; plans and sizes are those of the fresh one given."""
        names = ("config", "schedule", "algorithm", "grid", "finisher", "watch", "plans", "sizes")
        return cls(**{name: getattr(merge_pass, name) for name in names}, short=short)

    @property
    @override
    def has_class_token(self) -> bool:
        return self.schedule.n_leading > 0

    def source_after(self, layer: int) -> Tensor | None:
        """[B, N] int64, the token after a layer that each first one is in; None for itself."""
        source = None
        for index in sorted(self.plans):
            if index <= layer:
                own = self.plans[index].assign
                source = own if source is None else own.gather(1, source)
        return source

    def spread(self, hidden: Tensor, layer: int) -> Tensor:
        """What a layer left, [B, M, C], as [B, N, C]."""
        source = self.source_after(layer)
        return hidden if source is None else take_tokens(hidden, source.to(hidden.device))

    def spread_states(self, states: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """States before the first layer and after each, all of them as long as the first."""
        full = self.schedule.n_tokens + self.schedule.n_leading
        return tuple(
            state if state is None or state.shape[1] == full else self.spread(state, index - 1)
            for index, state in enumerate(states)
        )

    def leaving(self, layer: int, hidden: Tensor) -> Tensor:
        """What a layer hands on: of the last one, all tokens unless the output is to be short."""
        if self.short or layer < self.schedule.n_layers - 1:
            return hidden
        return self.spread(hidden, layer)

    def angles_before(self, layer: int, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the patches that enter a layer: those of the patch named.

        Args:
            layer: its number.
            angles: of all patches, [N, D] each.

        Returns:
            [N, D] each while all patches are there, then [B, 1, M, D].
        """
        anchors = None
        for index in sorted(self.plans):
            if index < layer:
                kept = self.plans[index].kept
                anchors = kept if anchors is None else anchors.gather(1, kept)
        cos, sin = angles
        if anchors is None:
            return cos, sin
        patches = anchors[:, self.schedule.n_leading :] - self.schedule.n_leading
        return cos[patches][:, None], sin[patches][:, None]


class EncoderLayer(MergingLayer):
    """Mixin before the class of a layer of an encoder."""

    @override
    def _pitome_merged(self, hidden: Tensor, merge_pass: MergePass, angles: Any) -> Tensor:
        assert isinstance(merge_pass, EncoderPass)
        layer, names = self._pitome_layer, self._pitome_parts
        kernels = kernels_of(names)
        if names.rotary:
            leading = merge_pass.schedule.n_leading
            turn = functools.partial(_turned, leading, *merge_pass.angles_before(layer, angles))
            kernels = dataclasses.replace(kernels, turn=turn)
        hidden = merged_layer(self, layer, hidden, merge_pass, kernels, names)
        return merge_pass.leaving(layer, hidden)


def _turned(leading: int, cos: Tensor, sin: Tensor, heads: Heads) -> Heads:
    """Queries and keys [B, H, M, D] with their patches turned to their places."""
    query, key, value = heads
    return _patches_turned(query, leading, cos, sin), _patches_turned(key, leading, cos, sin), value


def _patches_turned(x: Tensor, leading: int, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.cat([x[:, :, :leading], rotated(x[:, :, leading:], 1, cos, sin)], 2)
