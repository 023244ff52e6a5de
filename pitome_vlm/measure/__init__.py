"""What merging costs and saves: FLOPs, memory, time, accuracy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..common import lazy_names

if TYPE_CHECKING:
    from .accounting import Costs, costs
    from .described import Description
    from .description import describe, from_config
    from .timing import Timing, time_prefill

__all__ = ["Costs", "Description", "Timing", "costs", "describe", "from_config", "time_prefill"]

__getattr__ = lazy_names(
    __name__,
    dict.fromkeys(("Costs", "costs"), "accounting")
    | {"Description": "described", "describe": "description", "from_config": "description"}
    | dict.fromkeys(("Timing", "time_prefill"), "timing"),
)
