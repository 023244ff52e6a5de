"""Greedy max-min selection as one Triton kernel; a loop launches three for every token.

Imported where it is used, because Triton comes with PyTorch's CUDA builds only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def farthest_first(distance: Tensor, first: Tensor, n_out: int) -> Tensor:
    """The tokens farthest from all that are chosen, one after the other.

    Args:
        distance: [B, N, N] float32 or float64, contiguous, on a CUDA device; minus infinity from
            every token to itself, so that none is chosen twice.
        first: [B] int64, the first choice of every image.
        n_out: tokens to choose, 1..N.

    Returns:
        [B, n_out] int64; ties go to the earlier token.
    """
    batch, n_tokens, _ = distance.shape
    chosen = first.new_empty(batch, n_out)
    block = triton.next_power_of_2(n_tokens)
    with torch.cuda.device_of(distance):  # type: ignore[no-untyped-call]
        _select[(batch,)](distance, first, chosen, n_tokens, n_out, block=block)
    return chosen


@triton.jit  # type: ignore[untyped-decorator]
def _select(distance, first, chosen, n_tokens, n_out, block: tl.constexpr):  # type: ignore[no-untyped-def]
    # One program for each image: every choice depends on the one before.
    image = tl.program_id(0).to(tl.int64)
    token = tl.arange(0, block)
    inside = token < n_tokens
    distance += image * n_tokens * n_tokens
    chosen += image * n_out
    choice = tl.load(first + image)
    tl.store(chosen, choice)
    nearest = tl.load(distance + choice * n_tokens + token, mask=inside, other=-float("inf"))
    for step in range(1, n_out):
        # NaN compares with nothing, so argmax may point past the row; reads must stay inside.
        choice = tl.minimum(tl.argmax(nearest, 0), n_tokens - 1).to(tl.int64)
        tl.store(chosen + step, choice)
        row = tl.load(distance + choice * n_tokens + token, mask=inside, other=-float("inf"))
        nearest = tl.minimum(nearest, row)
