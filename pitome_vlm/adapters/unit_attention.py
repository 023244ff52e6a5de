"""Attention of packed images whose segments have any lengths, with sizes on the logits.

Axes: S patches of the sequence, H heads, D channels of a head, C of the tower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..releases import rotary_at
from .merged_layer import Heads, as_is, attention_received
from .own_attention import implementation, own_attention, takes_channels


@dataclass(frozen=True)
class Segmented:
    """A sequence cut into segments, those of one length side by side in a batch.

    Attributes:
        shapes: (segments, patches of each) of every batch.
        order: [S] int64, the place in the sequence of every patch of the batches; None where there
            is one batch.
        back: [S] int64, the reverse.
        ends: [segments + 1] int32, where segments begin and end in the sequence.
        longest: patches of the longest segment.
    """

    shapes: tuple[tuple[int, int], ...]
    order: Tensor | None
    back: Tensor | None
    ends: Tensor
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Segmented:
        """The segments of so many patches each."""
        starts: dict[int, list[int]] = {}
        ends = [0]
        for length in lengths:
            starts.setdefault(length, []).append(ends[-1])
            ends.append(ends[-1] + length)
        order = back = None
        if len(starts) > 1:
            places = [
                (torch.tensor(own)[:, None] + torch.arange(n)).flatten()
                for n, own in starts.items()
            ]
            order = torch.cat(places)
            order, back = order.to(device), order.argsort().to(device)
        shapes = tuple((len(own), n) for n, own in starts.items())
        cut = torch.tensor(ends, dtype=torch.int32, device=device)
        return cls(shapes, order, back, cut, max(lengths))

    def batches(self, x: Tensor) -> list[Tensor]:
        """[S, ...] as one [segments, patches, ...] tensor per length."""
        ordered = x if self.order is None else x[self.order]
        parts = torch.split(ordered, [k * n for k, n in self.shapes])
        pairs = zip(parts, self.shapes, strict=True)
        return [part.reshape(*shape, *part.shape[1:]) for part, shape in pairs]

    def joined(self, parts: list[Tensor]) -> Tensor:
        """The reverse of `batches`."""
        ordered = torch.cat([part.flatten(0, 1) for part in parts])
        return ordered if self.back is None else ordered[self.back]


def project(attention: Any, normed: Tensor, cos: Tensor, sin: Tensor) -> Heads:
    """Queries, keys and values of [S, C], each [S, H, D], turned to their places.

    From the live projection, so that LoRA and quantised layers are seen as they are.
    """
    heads = attention.qkv(normed).view(len(normed), 3, attention.num_heads, -1)
    query, key, value = heads.unbind(1)
    return turned(query, cos, sin), turned(key, cos, sin), value


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions [S, D] on heads [S, H, D], computed in at least float32."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    first, second = exact.chunk(2, -1)
    found = exact * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]
    return found.to(x.dtype)


def attend(attention: Any, heads: Heads, segments: Segmented, bias: Tensor | None) -> Tensor:
    """`attend_within`, and the output projection of a block: [S, C]."""
    dropout = getattr(attention, "attention_dropout", 0.0)
    output = attend_within(attention, heads, segments, bias, attention.scaling, dropout)
    projected: Tensor = attention.proj(output.flatten(1))
    return projected


def attend_within(
    attention: Any,
    heads: Heads,
    segments: Segmented,
    bias: Tensor | None,
    scale: float,
    dropout: float,
) -> Tensor:
    """Attention within every segment.

    Args:
        attention: the layer's attention.
        heads: queries, keys and values, each [S, H, D].
        segments: of the sequence.
        bias: [S] float32 or wider, added to the logits of every key; None for nothing.
        scale: of the logits.
        dropout: of the attention weights, where the layer is trained.

    Returns:
        [S, H, D].
    """
    more: dict[str, Any] = {"scale": scale, "dropout": dropout}
    if takes_channels(implementation(attention), heads[2].shape[-1]):
        packed: Any = [one.transpose(0, 1)[None] for one in heads]
        row = None if bias is None else bias[None, None, None]
        cut: dict[str, Any] = {"cu_seq_lens_q": segments.ends, "cu_seq_lens_k": segments.ends}
        cut |= {"max_length_q": segments.longest, "max_length_k": segments.longest}
        return own_attention(attention, packed, row, **more, **cut)[0]
    parts = [
        own_attention(attention, own, row, **more) for own, row in batched(heads, segments, bias)
    ]
    return segments.joined(parts)


def batched(
    heads: Heads, segments: Segmented, bias: Tensor | None
) -> list[tuple[Heads, Tensor | None]]:
    """Heads [S, H, D] and a bias [S] by the length of segments, for attention of a batch.

    Returns:
        Heads [segments, H, patches, D] and the bias [segments, 1, 1, patches] of every length.
    """
    query, key, value = ([part.transpose(1, 2) for part in segments.batches(one)] for one in heads)
    rows: list[Tensor | None] = [None] * len(query)
    if bias is not None:
        rows = [part[:, None, None] for part in segments.batches(bias)]
    return list(zip(zip(query, key, value, strict=True), rows, strict=True))


def attention_by_unit(
    heads: Heads, segments: Segmented, bias: Tensor | None, scale: float, patches: int
) -> Tensor:
    """How much attention every unit gets within its segment, averaged over heads and queries.

    Args:
        heads: queries, keys and values, each [S, H, D].
        segments: of the sequence.
        bias: [S], see `attend_within`.
        scale: of the logits.
        patches: of a unit, neighbours in the sequence.

    Returns:
        [1, S / patches] float32; the units of a segment sum to one.
    """
    parts = [
        attention_received(own[0], own[1], row, scale, False)
        for own, row in batched(heads, segments, bias)
    ]
    return segments.joined([part[..., None] for part in parts]).view(1, -1, patches).sum(-1)


def scaling(attention: Any) -> float:
    """What the logits of an attention are scaled by."""
    found: float = attention.scaling
    return found


@dataclass(frozen=True)
class UnitKernels:
    """How attention of a tower of units is run, from the modules that a library built it of.

    Attributes:
        parts: names that the attention of every block has.
        angles: (the tower's rotary embedding, any states for their device, places [S, 2]) to
            cosines and sines, each [S, D].
        project: as the function of that name.
        attend: as the function of that name.
        scale: of the logits of an attention.
        agree: averages a tensor over all processes that share the heads of one layer, because all
            of them have to make the same plan.
    """

    parts: tuple[str, ...] = ("qkv", "proj", "num_heads", "scaling")
    angles: Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]] = rotary_at
    project: Callable[[Any, Tensor, Tensor, Tensor], Heads] = project
    attend: Callable[[Any, Heads, Segmented, Tensor | None], Tensor] = attend
    scale: Callable[[Any], float] = scaling
    agree: Callable[[Tensor], Tensor] = as_is


KERNELS = UnitKernels()
