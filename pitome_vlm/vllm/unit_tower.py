"""Merging in vLLM's towers of Qwen's kind: how their attention is run.

Everything else is `adapters/unit_tower.py`, whose mixins work on vLLM's blocks and patch mergers as
on those of transformers.

Axes: S patches of the sequence, H heads of this process, D channels of a head, C of the tower.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..adapters.merged_layer import Heads
from ..adapters.unit_attention import Segmented, UnitKernels, batched, turned
from ..adapters.unit_tower import UnitTower
from .tower import mean_over_ranks


def _angles(rotary: Any, hidden: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [S, D]; half of the pairs of channels turn by row, half by column."""
    del hidden
    steps = rotary._compute_inv_freq(rotary.base).to(places)
    angles = (places[..., None] * steps).flatten(1).repeat(1, 2)
    return angles.cos(), angles.sin()


def _project(attention: Any, normed: Tensor, cos: Tensor, sin: Tensor) -> Heads:
    """Queries, keys and values of [S, C], each [S, H, D], turned to their places."""
    fused, _ = attention.qkv(normed)
    if hasattr(attention, "split_qkv"):
        # Qwen2-VL: processes hold rows of all three, which are first gathered.
        query, key, value = (one.squeeze(1) for one in attention.split_qkv(fused[:, None]))
    else:
        heads = attention.num_attention_heads_per_partition
        query, key, value = fused.view(len(normed), 3, heads, -1).unbind(1)
    return turned(query, cos, sin), turned(key, cos, sin), value


def _attend(attention: Any, heads: Heads, segments: Segmented, bias: Tensor | None) -> Tensor:
    """Attention within segments and the output projection, [S, C].

    With torch's kernel: vLLM's encoder attention takes no additive mask on any backend.
    """
    parts = []
    for own, row in batched(heads, segments, bias):
        mask = None if row is None else row.to(own[0].dtype)
        output = scaled_dot_product_attention(*own, attn_mask=mask, scale=_scale(attention))
        parts.append(output.transpose(1, 2))
    projected: Tensor = attention.proj(segments.joined(parts).flatten(1))[0]
    return projected


def _scale(attention: Any) -> float:
    found: float = attention.hidden_size_per_attention_head**-0.5
    return found


UNIT_TOWER = UnitTower(
    UnitKernels(
        ("qkv", "proj", "num_attention_heads_per_partition", "hidden_size_per_attention_head"),
        _angles,
        _project,
        _attend,
        _scale,
        mean_over_ranks,
    )
)
