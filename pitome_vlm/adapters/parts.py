"""The parts of a model by which costs and weights are counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

# Names of vision towers and of what follows them, in `model.model`.
TOWERS = ("vision_tower", "visual", "vision_model", "vision_encoder", "image_tower", "video_tower")
# Qwen's and GLM's are part of the tower.
PROJECTORS = (
    *("multi_modal_projector", "connector", "aligner", "projector", "vision_projection"),
    *("mm_projector", "merger", "embed_vision"),
)


@dataclass(frozen=True)
class ModelParts:
    """Where the weights of a model are.

    Attributes:
        vision_tower: everything an image goes through before the projector.
        vision_config: its configuration: image_size, patch_size, hidden_size, num_hidden_layers.
        projector: from the width of the tower to that of the language model.
        language_model: what every token of a prompt goes through, without `lm_head`.
        all_logits: before the first token, logits are computed for every position of the prompt
            and not only for the last one.
        video_tower: where videos have a tower of their own.
    """

    vision_tower: nn.Module
    vision_config: Any
    projector: nn.Module
    language_model: tuple[nn.Module, ...]
    all_logits: bool = False
    video_tower: nn.Module | None = None

    @property
    def towers(self) -> tuple[nn.Module, ...]:
        """All vision towers."""
        found = (self.vision_tower, self.video_tower)
        return tuple(tower for tower in found if tower is not None)
