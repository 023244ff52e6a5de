"""What most families answer alike.

Knows: that positions of a prompt usually count up, that a tower's layers can be counted one by one,
and that pictures are usually squares of one size. Does not know: any family.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..merge.counts import Footprint


class UsualModel:
    """Base of adapters for models without ways of their own here; see `Adapter`."""

    pixel_inputs: Mapping[str, str]
    videos_pooled_first = False
    own_positions = False
    place_inputs: tuple[str, ...] = ()

    def prompt_places(
        self, model: Any, inputs: Mapping[str, Any], mask: Tensor | None
    ) -> Tensor | None:
        """See `Adapter`: positions count up."""
        del model, inputs, mask
        return None

    def opening_token(self, model: Any) -> int | None:
        """See `Adapter`: placeholders stand in the text just so."""
        del model
        return None

    def random_pictures(
        self,
        model: Any,
        ids: Tensor,
        n_pictures: int,
        *,
        image_size: tuple[int, int] | None,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """See `Adapter`: squares of the tower's size."""
        del ids, image_size
        vision = getattr(model.config, "vision_config", None)
        if vision is None:
            raise TypeError(f"inputs of a {type(model).__name__} are not made up; pass your own")
        side = vision.image_size
        names = [name for name, kind in self.pixel_inputs.items() if kind == "image"]
        # Releases of transformers differ in what they call it.
        taken = inspect.signature(model.forward).parameters
        name = next((name for name in names if name in taken), names[0])
        return {name: torch.randn(n_pictures, 3, side, side, generator=generator)}

    def tower_flops(self, model: Any, footprint: Footprint) -> int | None:
        """See `Adapter`: layers are counted one by one."""
        del model, footprint
        return None
