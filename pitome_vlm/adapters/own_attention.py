"""A layer's own attention implementation, with an additive bias per key.

Shared by all towers in which tokens merge: the bias is log(size) of every token.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from ..merge.size_channels import WIDEST, channel_width, with_size_channels
from ..releases import ADDS_ROW_MASK, FLASH, eager_adds_mask
from .merged_layer import Heads

logger = logging.get_logger(__name__)


def own_attention(
    attention: Any, heads: Heads, bias: Tensor | None, scale: float, dropout: float, **more: Any
) -> Tensor:
    """What the attention of a layer makes of its heads, with the layer's own implementation.

    Args:
        attention: the layer's attention, whose configuration names the implementation.
        heads: queries, keys and values, each [B, heads, N, D].
        bias: [B, 1, 1, N] float32 or wider, added to the logits of every key; None for nothing.
        scale: of the logits.
        dropout: of the attention weights, where the layer is trained.
        **more: what the implementation takes besides.

    Returns:
        [B, N, heads, D].
    """
    name, head_dim = implementation(attention), heads[2].shape[-1]
    if bias is not None and name not in ADDS_ROW_MASK:
        if takes_channels(name, head_dim):
            heads, bias = with_size_channels(*heads, bias, scale), None
        else:
            logger.warning_once(
                f"attention implementation {name!r} takes no additive mask; vision layers after "
                "the first merge use 'sdpa' for proportional attention"
            )
            name = "sdpa"
    output, _ = _kernel(attention, name)(
        attention,
        *heads,
        _mask(bias, name, heads[0].dtype),
        scaling=scale,
        dropout=dropout if attention.training else 0.0,
        is_causal=False,
        **more,
    )
    found: Tensor = output[..., :head_dim]
    return found


def implementation(attention: Any) -> str:
    """The name of a layer's attention implementation.

    Layers whose own attention cannot be given a bias use PyTorch's.
    """
    name: str = attention.config._attn_implementation or "sdpa"
    if name == "eager" and not eager_adds_mask(inspect.getmodule(type(attention))):
        return "sdpa"
    return name


def takes_channels(name: str, head_dim: int) -> bool:
    """Whether an implementation computes softmax(q k) v for heads of more channels.

    Flash kernels do. About others nothing is known: one that quantises its keys would lose the
    channels.
    """
    return FLASH in name and channel_width(head_dim) <= WIDEST


def _mask(bias: Tensor | None, name: str, dtype: torch.dtype) -> Tensor | None:
    # PyTorch's kernels want the mask in the queries' dtype; plain addition takes the exact one.
    return bias if bias is None or name == "eager" else bias.to(dtype)


def _kernel(attention: Any, name: str) -> Any:
    if name == "eager":
        return inspect.getmodule(type(attention)).eager_attention_forward  # type: ignore[union-attr]
    return ALL_ATTENTION_FUNCTIONS[name]
