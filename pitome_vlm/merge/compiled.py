"""Plans made by one compiled function each: fewer kernels to launch, for the same groups.

What is compiled is the decision, without gradients; values are merged by `MergePlan.apply`.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .algorithm import Algorithm, MergeContext, make_plan
from .plan import MergePlan


def compiled_plan(
    algorithm: Algorithm, keys: Tensor, n_out: int, *, ctx: MergeContext
) -> MergePlan:
    """`make_plan` as a compiled function, made at the first call with these shapes and options.

    Groups are those of `make_plan` but for ties that rounding decides. Inside a model that is
    being compiled as a whole this is `make_plan` itself.

    Args:
        algorithm: makes the plans.
        keys: [B, n_leading + N, D], see `make_plan`.
        n_out: mergeable tokens to leave.
        ctx: what the algorithm may look at.
    """
    if torch.compiler.is_compiling():
        return make_plan(algorithm, keys, n_out, ctx=ctx)
    fixed = ctx.config, ctx.depth, ctx.n_leading, n_out
    made = _compiled(ctx.layer, keys.dtype, (*fixed, keys.shape, keys.device))
    return MergePlan.put_together(*made(algorithm, keys.detach(), n_out, ctx))


def _parts(
    algorithm: Algorithm, keys: Tensor, n_out: int, ctx: MergeContext
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return make_plan(algorithm, keys, n_out, ctx=ctx).taken_apart()


@functools.lru_cache(maxsize=256)
def _compiled(layer: int, dtype: torch.dtype, key: Any) -> Callable[..., Any]:  # noqa: ARG001
    """A function of its own for every layer and key: PyTorch limits compilations of one code."""
    code = _parts.__code__.replace(co_name=f"plan_of_layer_{layer}")
    own = types.FunctionType(code, _parts.__globals__)
    compiled: Callable[..., Any] = torch.compile(
        own, fullgraph=True, dynamic=False, options=_rounding_options(dtype)
    )
    return compiled


def _rounding_options(dtype: torch.dtype) -> dict[str, Any] | None:
    """Options with which values of a dtype are rounded as in plain code.

    Fused loops keep float32 where plain code rounds to half precision, so near ties would fall
    otherwise. PyTorch 2.6 fails with the option; on a CPU some later releases do not heed it.
    """
    release = tuple(int(number) for number in torch.__version__.split(".")[:2])
    if dtype.itemsize >= 4 or release < (2, 7):
        return None
    return {"emulate_precision_casts": True}
