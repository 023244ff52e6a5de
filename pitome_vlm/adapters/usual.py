"""What most families answer alike.

Knows: that positions of a prompt usually count up, and that a tower's layers can be counted one by
one. Does not know: any family.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..counts import Footprint


class UsualModel:
    """Base of adapters for models without ways of their own here; see `Adapter`."""

    videos_pooled_first = False
    own_positions = False
    place_inputs: tuple[str, ...] = ()

    def prompt_places(
        self, model: Any, inputs: Mapping[str, Any], mask: Tensor | None
    ) -> Tensor | None:
        """See `Adapter`: positions count up."""
        del model, inputs, mask
        return None

    def tower_flops(self, model: Any, footprint: Footprint) -> int | None:
        """See `Adapter`: layers are counted one by one."""
        del model, footprint
        return None
