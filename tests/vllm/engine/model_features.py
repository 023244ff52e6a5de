"""What is computed inside the processes of an engine; a module, as functions travel by name."""

from __future__ import annotations

import torch

from pitome_vlm import MergeConfig
from pitome_vlm.vllm import plan_serving


def features_of(options, pixels, model):
    """Visual tokens of a running model under each of several merge options."""
    own, found = model._plan, []
    for one in options:
        model._plan = plan_serving(model.config, MergeConfig.from_dict(one))
        with torch.inference_mode():
            whole = torch.stack(list(model.embed_multimodal(pixel_values=pixels)))
            # Without what the language model is told about them.
            found.append(whole[..., : model.config.text_config.hidden_size].float().clone())
    model._plan = own
    return found
