"""Ways to add log(size) to attention, timed against each other and against plain attention.

The package itself uses size channels for flash kernels and a mask everywhere else
(`pitome_vlm.adapters.tower`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from pitome_vlm.measure.bench.clock import Clock
from pitome_vlm.merge.size_channels import with_size_channels

# The first calls choose kernels and compile.
WARM_UP = 3
# Between two marks on an accelerator, where one call takes less time than launching it.
CALLS = 20

# Queries, keys and values [B, heads, N, D], log sizes [B, 1, 1, N] (float32 or wider) and the scale
# of the logits to [B, heads, N, D].
Way = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]


def first_line(error: BaseException) -> str:
    """Of an error's message, as a cell of a table; some have no message."""
    return next(iter(str(error).splitlines()), "no details")[:120].replace("|", "/")


def plain(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Attention that ignores sizes: what the others are compared with."""
    del bias
    return scaled_dot_product_attention(query, key, value, scale=scale)


def by_mask(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
    """`scaled_dot_product_attention` with an additive mask."""
    mask = bias.to(query.dtype)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def by_channel(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
    """`scaled_dot_product_attention` without a mask, so that any of its kernels can be used."""
    wide = with_size_channels(query, key, value, bias, scale)
    return scaled_dot_product_attention(*wide, scale=scale)[..., : value.shape[-1]]


def by_flex(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
    """FlexAttention with a function of its own that adds the sizes; fast only when compiled."""
    row = bias[:, 0, 0]

    def add_size(score: Tensor, image: Tensor, _head: Tensor, _q: Tensor, kv: Tensor) -> Tensor:
        return score + row[image, kv]

    output = flex_attention(query, key, value, score_mod=add_size, scale=scale)
    assert isinstance(output, Tensor)
    return output


WAYS: dict[str, Way] = {"plain": plain, "mask": by_mask, "channel": by_channel, "flex": by_flex}


@torch.no_grad()
def time_ways(
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    repeats: int,
    *,
    compile_flex: bool = True,
) -> dict[str, list[float] | str]:
    """Milliseconds of every way, in turns.

    Args:
        device: where to run.
        dtype: of queries, keys and values.
        shape: (batch, heads, tokens, head_dim).
        repeats: timed rounds.
        compile_flex: compile flex attention, which is slow otherwise.

    Returns:
        One entry per round by name; the error message where a way does not run here.
    """
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3)
    )
    sizes = torch.randint(1, 9, (shape[0], shape[2]), generator=generator).to(device)
    bias, scale = sizes.float().log()[:, None, None], shape[3] ** -0.5
    ways = dict(WAYS)
    if compile_flex:
        ways["flex"] = torch.compile(by_flex, dynamic=False)
    calls = 1 if device.type == "cpu" else CALLS
    found: dict[str, list[float] | str] = {name: [] for name in ways}
    for turn in range(WARM_UP + repeats):
        for name, way in ways.items():
            times = found[name]
            if isinstance(times, str):
                continue
            clock = Clock(device)
            try:
                with clock.span(name):
                    for _ in range(calls):
                        way(query, key, value, bias, scale)
                clock.synchronize()
            except Exception as error:  # whatever a compiler or kernel says is the result here
                found[name] = f"{type(error).__name__}: {first_line(error)}"
                continue
            if turn >= WARM_UP:
                times.append(clock.total(name) / calls)
    return found
