"""The demo model's architecture and initial weights.

Knows the sizes of the tower and the language model and how their weights start. Leaves
data to `data.py`, training to `tower.py` and `language.py`.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PretrainedConfig,
)

from pitome_vlm.demo.processor import (
    BOS,
    EOS,
    GRID,
    IMAGE,
    IMAGE_SIZE,
    PAD,
    PATCH_SIZE,
    PATCHES,
    vocabulary,
)

FEATURE_LAYER = -2


def build_model(
    vision_layers: int = 8, vision_width: int = 128, text_layers: int = 5, text_width: int = 160
) -> LlavaForConditionalGeneration:
    """A small LLaVA with freshly initialised weights, in float32."""
    return llava_of(
        vision_config(vision_layers, vision_width),
        text_config(text_layers, text_width),
        PATCHES,
    )


def llava_of(
    vision: PretrainedConfig, text: PretrainedConfig, patches: int
) -> LlavaForConditionalGeneration:
    """A LLaVA with freshly initialised weights, in float32, that reads `patches` of an image."""
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        image_token_index=IMAGE,
        projector_hidden_act="gelu",
        vision_feature_layer=FEATURE_LAYER,
        vision_feature_select_strategy="default",
        image_seq_length=patches,
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    model.set_attn_implementation("sdpa")
    generation = model.generation_config
    generation.pad_token_id, generation.bos_token_id, generation.eos_token_id = PAD, BOS, EOS
    generation.do_sample = False
    initialise(model)
    return model


def vision_config(layers: int, width: int) -> CLIPVisionConfig:
    """A CLIP tower for 120 x 120 images."""
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        hidden_act="gelu",
        projection_dim=width,
    )


def text_config(layers: int, width: int, words: int | None = None) -> LlamaConfig:
    """A Llama over so many words, those of the demo without a number."""
    return LlamaConfig(
        vocab_size=words or len(vocabulary()),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=512,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=False,
    )


def initialise(model: LlavaForConditionalGeneration) -> None:
    """Weights ~ 1/sqrt(fan in): the library default of 0.02 stalls at this width."""
    layers = model.config.vision_config.num_hidden_layers
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(p)
        elif "embed_tokens" in name:
            nn.init.normal_(p, 0, 0.5)
        elif "position_embedding" in name and p.ndim == 2:
            p.data.copy_(position_table(p.shape[1]))
        elif p.ndim >= 2:
            std = p[0].numel() ** -0.5
            if any(part in name for part in ("out_proj", "fc2", "o_proj", "down_proj")):
                std /= math.sqrt(2 * layers)
            nn.init.normal_(p, 0, std)


def position_table(width: int) -> torch.Tensor:
    """Sine tables of row and column for the patches, zeros for CLS."""
    frequencies = 0.5 ** torch.linspace(0, 5, width // 4) * math.pi
    angles = torch.arange(GRID)[:, None] * frequencies
    wave = torch.cat([angles.sin(), angles.cos()], 1)
    rows = wave[:, None].expand(-1, GRID, -1)
    columns = wave[None].expand(GRID, -1, -1)
    table = torch.cat([rows, columns], -1).reshape(PATCHES, width) * 0.5
    return torch.cat([torch.zeros(1, width), table])
