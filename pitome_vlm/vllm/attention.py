"""Attention of vLLM that adds log sizes of merged tokens to its logits, on any of its kernels.

No kernel of vLLM takes a bias on single keys, but softmax(scale * q k) has room for one where heads
are wider than what they hold: the size channels of `merge/size_channels.py`. They end in the KV
cache with the keys, so chunks, cached prefixes and decoded tokens need nothing of their own.

Axes: n tokens of a step, H heads, D channels of a head, W of a widened one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionType

from ..merge.size_channels import query_channels
from .language_config import UNCALIBRATED


class SizedAttention(Attention):
    """The attention of one layer, on heads that are widened by channels for sizes."""

    channels: Tensor

    def __init__(self, plain: Attention, wide: int, cache_config: Any, channels: Tensor) -> None:
        """Take the place of a layer's attention, under its name.

        Args:
            plain: the attention as vLLM built it.
            wide: W, channels of a head as the kernels see it.
            cache_config: vLLM's.
            channels: [most tokens of a step, W - D] what is appended to the keys of its tokens.
        """
        super().__init__(
            plain.num_heads,
            wide,
            plain.impl.scale,
            num_kv_heads=plain.num_kv_heads,
            cache_config=cache_config,
            quant_config=plain.quant_config,
            per_layer_sliding_window=plain.sliding_window,
            prefix=plain.layer_name,
        )
        self.narrow = plain.head_size
        self.register_buffer("channels", channels, persistent=False)

    @override
    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """[n, H * D] each, as every attention of vLLM."""
        shape = (len(query), -1, self.narrow)
        query, key, value = query.view(shape), key.view(shape), value.view(shape)
        sizes = self.channels[: len(key), None].expand(-1, key.shape[1], -1)
        query = query_channels(query, self.head_size).flatten(1)
        key = torch.cat([key, sizes], -1).flatten(1)
        value = pad(value, (0, self.head_size - self.narrow)).flatten(1)
        wide: Tensor = super().forward(query, key, value, *args, **kwargs)
        return wide.view(len(wide), -1, self.head_size)[..., : self.narrow].flatten(1)


def attentions(language_model: torch.nn.Module) -> list[tuple[Any, Attention]]:
    """Every attention that has a KV cache, with the module that calls it."""
    found = []
    for parent in language_model.modules():
        own = getattr(parent, "attn", None)
        if isinstance(own, Attention):
            found.append((parent, own))
    return found


def check(own: Attention) -> None:
    """Refuse attention whose logits are more than scale * q k.

    Raises:
        ValueError: this one's are.
    """
    impl, reason = own.impl, None
    if type(own) is not Attention or own.attn_type != AttentionType.DECODER:
        reason = f"is {type(own).__name__} ({own.attn_type})"
    elif getattr(impl, "logits_soft_cap", None):
        reason = "caps its logits"
    elif getattr(impl, "alibi_slopes", None) is not None:
        reason = "has ALiBi slopes"
    elif getattr(impl, "sinks", None) is not None:
        reason = "has attention sinks"
    elif own.kv_sharing_target_layer_name is not None:
        reason = "reads the KV cache of another layer"
    elif str(own.kv_cache_dtype).startswith(("fp8", "int", "nvfp4", "turbo", "ultra")):
        reason = f"rounds its KV cache to {own.kv_cache_dtype}"
    if reason is not None:
        raise ValueError(
            f"attention layer {own.layer_name!r} {reason}, so sizes of merged tokens cannot be "
            f"added to its logits; serve this model with {UNCALIBRATED}"
        )
