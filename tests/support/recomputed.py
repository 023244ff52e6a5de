"""What `generate` of an unwrapped model does, with the logits of a wrapped one.

A reference for every decoding mode: the caller's whole prompt, no cache, nothing carried from one
token to the next.
"""

from __future__ import annotations

import copy

import torch
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

# Columns of a prompt, by what the columns of new tokens hold.
COLUMNS = {"attention_mask": 1, "mm_token_type_ids": 0}


class Recomputed(PreTrainedModel, GenerationMixin):
    """Answers with the last logits of `model(whole conversation)`.

    Args:
        model: a wrapped model.
        batch: arguments of generate for one image per row.
    """

    _supports_sdpa = True

    def __init__(self, model, batch):
        super().__init__(copy.deepcopy(model.config.get_text_config()))
        self.inner, self.batch = [model], batch  # in a list: no module of this one
        self.generation_config = model.generation_config
        self.anchor = torch.nn.Parameter(torch.zeros(()))

    def copied(self, name, value, copies):
        if name in ("input_ids", *COLUMNS) or "image_grid_thw" not in self.batch:
            return value.repeat_interleave(copies, 0)
        rows = self.batch["image_grid_thw"].prod(1).tolist()
        parts = value.split(rows) if name == "pixel_values" else value.split(1)
        return torch.cat([part for part in parts for _ in range(copies)])

    def forward(self, input_ids=None, attention_mask=None, **_):
        prompt = self.batch["input_ids"]
        copies, new = len(input_ids) // len(prompt), input_ids.shape[1] - prompt.shape[1]
        if new < 0:  # the pass without a prompt of `guidance_scale`
            given = {"input_ids": input_ids, "attention_mask": attention_mask}
            return CausalLMOutputWithPast(logits=self.inner[0](**given, use_cache=False).logits)
        call = {n: self.copied(n, v, copies) for n, v in self.batch.items()}
        for name, fill in COLUMNS.items():
            if name in call:
                call[name] = torch.nn.functional.pad(call[name], (0, new), value=fill)
        call["input_ids"] = input_ids
        with torch.no_grad():
            logits = self.inner[0](**call, use_cache=False).logits
        return CausalLMOutputWithPast(logits=logits[:, -1:])

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        return {"input_ids": input_ids}

    def generate(self, **options):
        ids, mask = self.batch["input_ids"], self.batch["attention_mask"]
        call = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        return super().generate(**call | options)
