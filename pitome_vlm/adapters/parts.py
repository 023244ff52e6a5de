"""The parts of a model that costs and weights are counted by.

Knows: their names. Does not know: where a family keeps them (the adapters say that).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class ModelParts:
    """Where the weights of a model are.

    Attributes:
        vision_tower: everything a picture goes through before the projector.
        vision_config: its configuration: image_size, patch_size, hidden_size, num_hidden_layers.
        projector: from the width of the tower to that of the language model.
        language_model: what every token of a prompt goes through, `lm_head` not included.
        all_logits: before the first token, logits are computed for every position of the prompt
            and not for the last one alone.
    """

    vision_tower: nn.Module
    vision_config: Any
    projector: nn.Module
    language_model: tuple[nn.Module, ...]
    all_logits: bool = False
