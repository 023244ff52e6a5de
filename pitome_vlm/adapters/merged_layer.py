"""What a pre-norm ViT layer does when it merges: attention, residual, merge, MLP (paper eq. 1-2).

Shared by transformers (`tower.py`) and vLLM (`vllm/tower.py`), whose layers have the same
parts and kernels of their own.

Axes: B images, N tokens before, M tokens after a merge, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..merge.merge_pass import MergePass
from .layer_parts import CLIP_LIKE, LayerParts, reach

Heads = tuple[Tensor, Tensor, Tensor]

# Queries whose attention is computed in one piece for all images; of more, so many logits of one
# image and head at a time. By length alone, so that batching changes no answer.
WHOLE_UP_TO, PIECE = 4096, 2**24


def as_is(own: Any) -> Any:
    """The argument itself, where a kernel has nothing to do."""
    return own


@torch.no_grad()
def attention_received(
    query: Tensor, key: Tensor, bias: Tensor | None, scale: float, has_class_token: bool
) -> Tensor:
    """How much attention every token receives, averaged over heads.

    From the class token, as one row q_cls K^T; from all tokens where there is no class token
    (SigLIP; VisionZip, arXiv 2412.04467, section 3), head by head. The layer is never asked for
    its attention map, because that would rule out the fast kernels.

    Args:
        query: [B, heads, N, head_dim].
        key: [B, heads, N, head_dim].
        bias: [B, 1, 1, N] or None.
        scale: of the logits.
        has_class_token: token 0 is a class token.

    Returns:
        [B, N] float32, rows sum to one.
    """
    query = query[:, :, :1] if has_class_token else query
    (batch, heads, length), asked = key.shape[:3], query.shape[2]
    total = torch.zeros(batch, length, dtype=torch.float32, device=key.device)
    whole = asked <= WHOLE_UP_TO
    together, rows = (batch, asked) if whole else (1, max(1, PIECE // length))
    for first in range(0, batch, together):
        some = slice(first, first + together)
        for head in range(heads):
            for own in torch.split(query[some, head], rows, 1):
                logits = (own @ key[some, head].mT).float() * scale
                if bias is not None:
                    logits = logits + bias[some, 0].float()
                total[some] += logits.softmax(-1).sum(1) / asked
    return total / heads


@dataclass(frozen=True)
class LayerKernels:
    """How a layer's own attention is run: in two steps, so that a merge can use what is between.

    Attributes:
        project: (attention, normed [B, N, C]) to queries, keys and values, each
            [B, heads, N, head_dim].
        attend: (attention, those three, additive bias [B, 1, 1, N], float32 or wider, or None) to
            [B, N, C], the output projection included.
        turn: queries, keys and values to those that attend, where they are turned by place; tokens
            are compared by keys that are not.
        received: as `attention_received`.
        agree: averages a tensor over all processes that share the heads of one layer, because all
            of them have to make the same plan.
    """

    project: Callable[[Any, Tensor], Heads]
    attend: Callable[[Any, Heads, Tensor | None], Tensor]
    turn: Callable[[Heads], Heads] = as_is
    received: Callable[..., Tensor] = attention_received
    agree: Callable[[Tensor], Tensor] = as_is


def merged_layer(
    layer: Any,
    index: int,
    hidden: Tensor,
    merge_pass: MergePass,
    kernels: LayerKernels,
    names: LayerParts = CLIP_LIKE,
) -> Tensor:
    """A pre-norm encoder layer with its merge, where the pass touches it.

    Args:
        layer: an encoder layer.
        index: its number in the tower, from 0.
        hidden: [B, N, C].
        merge_pass: the encoding this call belongs to.
        kernels: how the layer's attention is run.
        names: of the layer's parts.

    Returns:
        [B, M, C].
    """
    attention = reach(layer, names.attention)
    norms = [reach(layer, name) for name in names.norms]
    placement = merge_pass.config.placement
    # Not rounded to half precision here: that is up to the kernel.
    exact = torch.promote_types(hidden.dtype, torch.float32)
    bias = merge_pass.attention_bias(index, exact)
    parts = kernels.project(attention, norms[0](hidden))
    turned = kernels.turn(parts)
    hidden = names.add(layer, 0, hidden, kernels.attend(attention, turned, bias))
    received = None
    if merge_pass.wants_attention(index):
        scale, has_class = names.scale_of(attention), merge_pass.has_class_token
        local = kernels.received(turned[0], turned[1], bias, scale, has_class)
        received = kernels.agree(local)
    if placement == "after_attention":
        metric = _compared(index, hidden, parts[1], merge_pass, kernels)
        hidden = merge_pass.merge_in_layer(index, hidden, metric, received)
    hidden = names.add(layer, 1, hidden, names.through_mlp(layer, norms[1](hidden)))
    if placement == "after_layer":
        metric = _compared(index, hidden, parts[1], merge_pass, kernels)
        hidden = merge_pass.merge_in_layer(index, hidden, metric, received)
    return hidden


def _compared(
    index: int, hidden: Tensor, key: Tensor, merge_pass: MergePass, kernels: LayerKernels
) -> Tensor:
    """The similarity metric for this layer, [B, N, D]; unused unless it merges."""
    if not merge_pass.merges(index):
        return hidden
    # The keys averaged over heads (paper eq. 3; 64-d for CLIP-L). Hidden states are the same in all
    # processes up to rounding, which may be enough to change the plan.
    return kernels.agree(key.mean(1) if merge_pass.compares_keys else hidden)
