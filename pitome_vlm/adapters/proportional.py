"""Proportional attention, softmax(Q K^T s + log m) V, for kernels with and without a mask.

Knows: how log(size) m becomes part of the keys, so that a kernel that adds nothing to its logits
adds it all the same. Does not know: layers, or which kernel a model uses (`tower.py`).

The identity: a further channel with 1 in every query and log(m) / s in the key of a token of size m
adds exactly log(m) to that token's scaled logit. In half precision one channel would round
log(m) / s to 8 bits (bfloat16), an error of 1 % in the weight of a large token. Widths have to be
a multiple of 8 anyway, so three channels hold it in parts that add up to the float32 value.

`WAYS` are the alternatives as plain functions, to be timed against each other on an accelerator.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

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
    """Queries, keys and values for a kernel that shall add `bias` to its logits without a mask.

    Args:
        query: [B, heads, N, D].
        key: [B, heads, N, D].
        value: [B, heads, N, D].
        bias: [B, 1, 1, N] log sizes, float32 or wider.
        scale: what the kernel multiplies q k by.

    Returns:
        The same with D' = `channel_width(D)` channels; only the first D of the kernel's output
        are to be used, the others are zero.
    """
    extra = channel_width(key.shape[-1]) - key.shape[-1]
    column = torch.arange(extra, device=query.device)
    ones = (column < _PARTS).to(query.dtype).expand(*query.shape[:-1], extra)
    parts = pad(_split(bias[:, :, 0] / scale), (0, extra - _PARTS)).to(key.dtype)
    sizes = parts.expand(*key.shape[:-1], extra)
    # Values get as wide as the keys: kernels want one width.
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


def by_mask(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
    """`scaled_dot_product_attention` with `bias` as an additive mask; shapes as in `by_channel`."""
    mask = bias.to(query.dtype)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def by_channel(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
    """`scaled_dot_product_attention` without a mask, so that any of its kernels can be used.

    Args:
        query: [B, heads, N, D].
        key: [B, heads, N, D].
        value: [B, heads, N, D].
        bias: [B, 1, 1, N] log sizes, float32 or wider.
        scale: of the logits.

    Returns:
        [B, heads, N, D].
    """
    wide = with_size_channels(query, key, value, bias, scale)
    return scaled_dot_product_attention(*wide, scale=scale)[..., : value.shape[-1]]


def by_flex(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
    """FlexAttention with `bias` added by a function of its own; shapes as in `by_channel`.

    Fast only where the caller compiles it (`torch.compile(by_flex)`).
    """
    from torch.nn.attention.flex_attention import flex_attention

    row = bias[:, 0, 0]

    def add_size(score: Tensor, image: Tensor, _head: Tensor, _q: Tensor, kv: Tensor) -> Tensor:
        return score + row[image, kv]

    output = flex_attention(query, key, value, score_mod=add_size, scale=scale)
    if not isinstance(output, Tensor):
        raise TypeError(f"flex_attention gave {type(output).__name__}, not a tensor")
    return output


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]] = {
    "mask": by_mask,
    "channel": by_channel,
    "flex": by_flex,
}
