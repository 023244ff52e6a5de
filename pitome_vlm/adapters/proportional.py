"""Proportional attention, softmax(Q K^T s + log m) V, for kernels that take no mask.

The identity: a further channel with 1 in every query and log(m) / s in the key of a token of size m
adds exactly log(m) to that token's scaled logit. In half precision one channel would round
log(m) / s to 8 bits (bfloat16), an error of 1 % in the weight of a large token. Widths have to be
a multiple of 8 anyway, so three channels hold it in parts that add up to the float32 value.
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


def with_size_channels(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values with which a kernel adds `bias` to its logits without a mask.

    Args:
        query: [B, heads, N, D].
        key: [B, heads, N, D].
        value: [B, heads, N, D].
        bias: [B, 1, 1, N] log sizes, float32 or wider.
        scale: what the kernel multiplies q k by.

    Returns:
        The same with D' = `channel_width(D)` channels. Use the first D channels of the kernel's
        output; the others are zero.
    """
    extra = channel_width(key.shape[-1]) - key.shape[-1]
    column = torch.arange(extra, device=query.device)
    ones = (column < _PARTS).to(query.dtype).expand(*query.shape[:-1], extra)
    parts = pad(_split(bias[:, :, 0] / scale), (0, extra - _PARTS)).to(key.dtype)
    sizes = parts.expand(*key.shape[:-1], extra)
    # Values become as wide as the keys, because kernels require one width.
    return torch.cat([query, ones], -1), torch.cat([key, sizes], -1), pad(value, (0, extra))


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
