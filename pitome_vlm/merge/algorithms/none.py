"""No merging, under a name, so that a table's first row runs through the same code as the rest."""

from __future__ import annotations

from torch import Tensor

from ..algorithm import Algorithm, MergeContext
from ..plan import MergePlan


def plan(keys: Tensor, n_out: int, *, ctx: MergeContext) -> MergePlan:
    """Every token its own group; ValueError where fewer tokens are wanted."""
    del ctx
    if n_out != keys.shape[1]:
        raise ValueError(
            f"algorithm 'none' keeps all {keys.shape[1]} tokens, but {n_out} were asked for; "
            "use keep=1.0"
        )
    return MergePlan.identity(keys)


ALGORITHM = Algorithm(name="none", plan=plan, source="no reduction", pairwise=False)
