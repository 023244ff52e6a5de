"""What is merged: budgets, counts, algorithms and plans. Tensors and integers, never models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..common import lazy_names

if TYPE_CHECKING:
    from .algorithm import Algorithm, MergeContext, PairLimits, make_plan
    from .config import MergeConfig
    from .plan import MergePlan

__all__ = ["Algorithm", "MergeConfig", "MergeContext", "MergePlan", "PairLimits", "make_plan"]

# `config`, `schedule` and `counts` are used without torch.
__getattr__ = lazy_names(
    __name__,
    dict.fromkeys(("Algorithm", "MergeContext", "PairLimits", "make_plan"), "algorithm")
    | {"MergeConfig": "config", "MergePlan": "plan"},
)
