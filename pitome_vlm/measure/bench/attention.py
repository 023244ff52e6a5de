"""Ways to add log(size) to attention, timed against each other and against plain attention.

Knows: shapes of a tower's attention, what a first call compiles. Does not know: towers, merging.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ...adapters.proportional import WAYS, by_flex
from .clock import Clock

# The first calls choose kernels and compile.
WARM_UP = 3
# Between two marks on an accelerator, where one call takes less time than launching it.
CALLS = 20


def first_line(error: BaseException) -> str:
    """Of an error's message, as a cell of a table; some have no message."""
    return next(iter(str(error).splitlines()), "no details")[:120].replace("|", "/")


def plain(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Attention that ignores sizes: what the others are compared with."""
    del bias
    return scaled_dot_product_attention(query, key, value, scale=scale)


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
        device: where.
        dtype: of queries, keys and values.
        shape: (batch, heads, tokens, head_dim).
        repeats: rounds.
        compile_flex: flex attention is fast only where it is compiled.

    Returns:
        One entry per round by name; what went wrong, where a way does not run here.
    """
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3)
    )
    sizes = torch.randint(1, 9, (shape[0], shape[2]), generator=generator).to(device)
    bias, scale = sizes.float().log()[:, None, None], shape[3] ** -0.5
    ways: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]]
    ways = {"plain": plain, **WAYS}
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
