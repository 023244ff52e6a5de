"""log(size) on attention logits for kernels that take no mask, as channels of queries and keys.

The identity: a further channel with 1 in every query and log(m) / s in the key of a token of size m
adds exactly log(m) to that token's logit, where s is what the kernel scales q k by. In half
precision one channel would round log(m) / s to 8 bits (bfloat16), an error of 1 % in the weight of
a large token. Widths have to be a multiple of 8 anyway, so three channels hold it in parts that add
up to the float32 value.

Vision towers and language models under flash kernels use this, and language models in vLLM.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

_PARTS = 3
# Flash kernels want rows of whole 16-byte words in half precision.
_MULTIPLE = 8
# The widest head that FlashAttention 2 and 3 take.
WIDEST = 256


def channel_width(head_dim: int) -> int:
    """The width of heads with the channels for log(size), padded to what flash kernels take."""
    return -(-(head_dim + _PARTS) // _MULTIPLE) * _MULTIPLE


def query_channels(query: Tensor, width: int) -> Tensor:
    """[..., D] to [..., width], with which a query reads the `key_channels`."""
    extra = width - query.shape[-1]
    ones = (torch.arange(extra, device=query.device) < _PARTS).to(query.dtype)
    return torch.cat([query, ones.expand(*query.shape[:-1], extra)], -1)


def key_channels(bias: Tensor, scale: float, extra: int, dtype: torch.dtype) -> Tensor:
    """What the further channels of keys hold.

    Args:
        bias: [...] what to add to the logits of every key, float32 or wider.
        scale: what the kernel multiplies q k by.
        extra: number of channels, at least 3.
        dtype: of the keys.

    Returns:
        [..., extra] in `dtype`.
    """
    exact = bias.to(torch.promote_types(bias.dtype, dtype))
    return pad(_split(exact / scale), (0, extra - _PARTS)).to(dtype)


def with_size_channels(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values with which a kernel adds `bias` to its logits without a mask.

    Args:
        query: [B, heads, Q, D].
        key: [B, key heads, N, D].
        value: [B, key heads, N, D], or fewer channels.
        bias: [B, 1, 1, N] log sizes, float32 or wider.
        scale: what the kernel multiplies q k by.

    Returns:
        The same with D' = `channel_width(D)` channels. Use as many of the kernel's output as
        `value` had; the others are zero.
    """
    width = channel_width(key.shape[-1])
    extra = width - key.shape[-1]
    sizes = key_channels(bias[:, :, 0], scale, extra, key.dtype)
    key = torch.cat([key, sizes.expand(*key.shape[:-1], extra)], -1)
    # Values become as wide as the keys, because kernels require one width.
    return query_channels(query, width), key, pad(value, (0, width - value.shape[-1]))


def _split(x: Tensor) -> Tensor:
    """[...] to [..., 3], three numbers whose sum is x; the first two fit into bfloat16.

    Bits are cut off instead of rounding to bfloat16 and back, which a compiler may leave out.
    """
    found = []
    for _ in range(_PARTS - 1):
        high = (x.float().view(torch.int32) & -(2**16)).view(torch.float32).to(x.dtype)
        found.append(high)
        x = x - high
    return torch.stack([*found, x], -1)
