"""Attention of a language model whose kernel takes no float mask: log(size) in wider heads.

Flash kernels read a mask as padding only, so what merged tokens stand for travels in channels of
queries and keys (`merge/size_channels.py`). The cache holds keys and values of the wider heads:
adding the channels at every step instead would copy the whole cache for every decoded token.

Axes: B rows, Q new columns, S columns of which sizes are known, K columns of keys, D channels.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..merge.size_channels import (
    channel_width,
    key_channels,
    query_channels,
    with_size_channels,
)
from ..releases import CACHE_NAMES, layer_configs
from .swap import is_swapped, swap_in, swap_out

# The argument of a pass that holds its `KeySizes`. Language models hand unknown arguments on to
# their attention layers.
KEY_SIZES = "pitome_key_sizes"
# What `WideAttention` is registered as in transformers; it calls the kernel that the model names.
IMPLEMENTATION = "pitome_wide_attention"
# Layers of a cache that keep exactly what they are given. A quantised one would lose small parts.
_EXACT_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)


@dataclass(eq=False)
class KeySizes:
    """What attention layers are told in one pass.

    Attributes:
        sizes: [B, S] float32 patches that the columns from the first cached one on stand for;
            columns after them have size 1. None where kernels are told nothing of sizes.
        total: columns cached and new.
        packed: [B, Q] integer positions that restart where samples share a row; None for one
            sample per row. Kernels would read the places of merged tokens as such restarts.
    """

    sizes: Tensor | None
    total: int
    packed: Tensor | None = None

    @cached_property
    def bias(self) -> Tensor:
        """[B, S] log sizes."""
        assert self.sizes is not None
        return self.sizes.log()

    def widened(self, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """New keys and values, [B, heads, Q, D], with the channels of their columns."""
        extra = channel_width(key.shape[-1]) - key.shape[-1]
        assert self.sizes is not None
        new = self.bias[:, self.total - key.shape[2] : self.total].to(key.device)
        if not new.shape[1]:
            # Decoded tokens are not merged.
            return pad(key, (0, extra)), pad(value, (0, extra))
        sizes = key_channels(_filled(new, key.shape[2]), scale, extra, key.dtype)[:, None]
        key = torch.cat([key, sizes.expand(*key.shape[:-1], extra)], -1)
        return key, pad(value, (0, extra))

    def of_keys(self, keys: int) -> Tensor:
        """[B, 1, 1, K] log sizes of the columns that a kernel gets.

        A sliding window's cache has dropped its first columns; a static one has room after.
        """
        first = max(0, self.total - keys)
        return _filled(self.bias[:, first : self.total], keys)[:, None, None]


def _filled(values: Tensor, length: int) -> Tensor:
    return pad(values, (0, length - values.shape[1]))


class WideAttention:
    """Mixin that `install_wide` puts before the class of attention layers."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward; its kernel and cache are told the sizes, if there are any."""
        told = kwargs.pop(KEY_SIZES, None)
        if told is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        for name in CACHE_NAMES:
            # Compressed keys and values (MLA) become those of the kernel after the cache.
            compressed = hasattr(self, "kv_lora_rank")
            if kwargs.get(name) is not None and told.sizes is not None and not compressed:
                kwargs[name] = _WideCache(kwargs[name], told, self.scaling)  # type: ignore[attr-defined]
        own = super().forward.__func__  # type: ignore[misc]
        return own(_StandIn(self, told), *args, **kwargs)


class _StandIn:
    """An attention layer that names our kernel; everything else is the layer's own."""

    def __init__(self, layer: Any, told: KeySizes) -> None:
        self.layer, self.told, self.config = layer, told, _Routed(layer.config)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)


class _Routed:
    """A configuration that names our kernel."""

    _attn_implementation = IMPLEMENTATION

    def __init__(self, config: Any) -> None:
        self.own = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)


class _WideCache:
    """A cache that is given wider keys and values, where it can hold them."""

    def __init__(self, cache: Any, told: KeySizes, scale: float) -> None:
        self.cache, self.told, self.scale = cache, told, scale

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As of the cache; keys and values come back wide where it holds them so."""
        if _holds_wide(self.cache, layer_idx, channel_width(key.shape[-1])):
            key, value = self.told.widened(key, value, self.scale)
        found: tuple[Tensor, Tensor] = self.cache.update(key, value, layer_idx, *args, **kwargs)
        return found


def _holds_wide(cache: Any, index: int, width: int) -> bool:
    """Whether a layer of a cache holds wide keys already, or none and can take such."""
    layers = getattr(cache, "layers", [])
    if index >= len(layers):
        return getattr(cache, "layer_class_to_replicate", None) in _EXACT_LAYERS
    keys: Any = getattr(layers[index], "keys", None)
    empty = keys is None or not keys.numel()
    return type(layers[index]) in _EXACT_LAYERS and (empty or keys.shape[-1] == width)


def _attend(
    layer: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Called by a layer's own forward; calls the kernel that the model names."""
    own, told, head_dim = layer.layer, layer.told, query.shape[-1]
    # Narrower than keys in MLA.
    width = value.shape[-1] if key.shape[-1] == head_dim else head_dim
    if attention_mask is None:
        # A static cache has room after the last column, which only a mask would hide.
        key, value = key[:, :, : told.total], value[:, :, : told.total]
    if key.shape[-1] != head_dim:
        query = query_channels(query, key.shape[-1])
    elif told.sizes is not None:
        bias = told.of_keys(key.shape[2]).to(query.device)
        query, key, value = with_size_channels(query, key, value, bias, own.scaling)
    kernel = ALL_ATTENTION_FUNCTIONS[own.config._attn_implementation]
    kwargs["position_ids"] = told.packed
    output, weights = kernel(own, query, key, value, attention_mask, **kwargs)
    return output[..., :width], weights


def head_dim(text_config: Any) -> int:
    """Channels of one attention head of a language model, the most where layers differ."""
    return max(head_dims(text_config))


def head_dims(text_config: Any) -> list[int]:
    """Channels of one attention head in every layer of a language model."""
    return [_head_dim(layer) for layer in layer_configs(text_config)]


def _head_dim(config: Any) -> int:
    own = getattr(config, "head_dim", None)
    return int(own or config.hidden_size // config.num_attention_heads)


def attention_layers(model: nn.Module, text_config: Any) -> list[nn.Module]:
    """Layers of the language model that leave attention to a kernel of transformers' table.

    Args:
        model: the model.
        text_config: the configuration that its language model's layers read.
    """
    return [
        module
        for module in model.modules()
        if getattr(module, "config", None) is text_config
        and hasattr(module, "scaling")
        and (is_swapped(module) or _uses_table(type(module)))
    ]


def _uses_table(kind: Any) -> bool:
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def install_wide(model: nn.Module, text_config: Any) -> None:
    """Put `WideAttention` before the class of the language model's attention layers; all or none.

    Raises:
        TypeError: it has none that leave attention to a kernel of transformers' table.
        RuntimeError: see `swap.swap_in`.
    """
    layers = attention_layers(model, text_config)
    if not layers:
        raise TypeError(
            f"the attention layers of {type(model).__name__}'s language model cannot be given "
            "size channels; load it with attn_implementation='sdpa', or pass size_bias=False, "
            "positions='compact'"
        )
    AttentionInterface.register(IMPLEMENTATION, _attend)
    try:
        for layer in layers:
            swap_in(layer, WideAttention)
    except BaseException:
        uninstall_wide(model)
        raise


def uninstall_wide(model: nn.Module) -> None:
    """Undo `install_wide`; a no-op where it was not called."""
    for module in model.modules():
        if isinstance(module, WideAttention):
            swap_out(module)
