"""The six lines of docs/adding-a-model.md, run on a family of models that nobody knows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from tiny import IMAGE, PATCHES, tiny_batch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationMixin,
    LlamaConfig,
    LlamaModel,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

import pitome_vlm
from pitome_vlm import adapters
from pitome_vlm.adapters.swap import is_swapped
from pitome_vlm.releases import CACHE_NAME, cache_of
from pitome_vlm.wrapping.wrap import is_wrapped

DOC = Path(__file__).parents[2] / "docs" / "adding-a-model.md"


class ToyConfig(PretrainedConfig):
    model_type = "toy_vlm"
    sub_configs: ClassVar = {"vision_config": CLIPVisionConfig, "text_config": LlamaConfig}

    def __init__(self, vision_config=None, text_config=None, **kwargs):
        self.vision_config = vision_config or CLIPVisionConfig()
        self.text_config = text_config or LlamaConfig()
        self.image_token_id, self.vision_feature_layer = IMAGE, -2
        super().__init__(**kwargs)


class ToyCore(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.eyes = CLIPVisionModel(config.vision_config)
        self.bridge = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)
        self.mind = LlamaModel(config.text_config)


class ToyModel(PreTrainedModel, GenerationMixin):
    config_class = ToyConfig
    base_model_prefix = "model"
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.model = ToyCore(config)
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.mind.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        inputs_embeds=None,
        attention_mask=None,
        position_ids=None,
        labels=None,
        logits_to_keep=0,
        **kwargs,
    ):
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            seen = self.model.eyes(pixel_values, output_hidden_states=True)
            features = self.model.bridge(seen.hidden_states[-2][:, 1:])
            here = (input_ids == IMAGE)[..., None]
            inputs_embeds = inputs_embeds.masked_scatter(here, features)
        known = {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        out = self.model.mind(**known, position_ids=position_ids, **kwargs)
        logits = self.lm_head(out.last_hidden_state[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            )
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE_NAME: cache_of(out)})


@pytest.fixture
def lines():
    """The block of the page, run; taken back afterwards."""
    before = list(adapters.ADAPTERS)
    blocks = re.findall(r"```python\n(.*?)```", DOC.read_text(), re.S)
    (block,) = (one for one in blocks if "ToyAdapter" in one)
    code = [line for line in block.splitlines() if line.strip()]
    exec("\n".join(code), {"__name__": "of_the_page"})
    yield code
    adapters.ADAPTERS[:] = before


@pytest.fixture
def model():
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    vision = CLIPVisionConfig(**size, num_hidden_layers=6, image_size=96, patch_size=8)
    text = LlamaConfig(**size, num_hidden_layers=2, vocab_size=128, pad_token_id=0)
    model = ToyModel(ToyConfig(vision, text)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.4)
        model.lm_head.weight[IMAGE] = 0
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def test_nobody_knows_the_family_before(model):
    with pytest.raises(TypeError, match=r"cannot wrap ToyModel \(model_type 'toy_vlm'\)"):
        pitome_vlm.wrap(model, keep=0.25)


def test_six_lines_are_enough(lines, model):
    assert len(lines) <= 6
    batch = tiny_batch()
    options = {"max_new_tokens": 5, "do_sample": False}
    with torch.no_grad():
        before = model(**batch).logits
    answer = model.generate(**batch, **options)
    pitome_vlm.wrap(model, keep=1.0)
    with torch.no_grad():
        assert torch.equal(before, model(**batch).logits)
    pitome_vlm.wrap(model, keep=0.25)
    described = pitome_vlm.describe(model)
    assert (described.tokens_in, described.tokens_out) == (PATCHES, PATCHES // 4)
    assert described.saved("total_flops") > 0
    with torch.no_grad():
        assert model(**batch).logits.shape[1] == before.shape[1] - 2 * (PATCHES - PATCHES // 4)
    merged = model.generate(**batch, **options)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for _ in range(5):
        call = batch | {"input_ids": ids, "attention_mask": mask}
        with torch.no_grad():
            last = model(**call, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, last.argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    assert torch.equal(merged, ids)
    pitome_vlm.unwrap(model)
    assert not is_wrapped(model)
    assert not any(is_swapped(module) for module in model.modules())
    assert torch.equal(answer, model.generate(**batch, **options))


def test_what_is_no_adapter_is_refused_by_name(lines):
    toy = type(find_adapter_named("toy_vlm"))
    for wrong, shown in ((toy, "ToyAdapter"), ("toy_vlm", "'toy_vlm'")):
        with pytest.raises(
            TypeError, match=f"subclass of pitome_vlm.adapters.Adapter, got {shown}"
        ):
            adapters.register(wrong)
    known = list(adapters.ADAPTERS)
    adapters.register(toy())
    assert known == adapters.ADAPTERS


def find_adapter_named(model_type):
    return next(one for one in adapters.ADAPTERS if model_type in one.model_types)


def test_two_adapters_for_one_model_type_are_refused(lines):
    class Other(adapters.HFLlavaAdapter):
        model_types = ("toy_vlm",)

    with pytest.raises(ValueError, match="'toy_vlm' is already served by ToyAdapter"):
        adapters.register(Other())
