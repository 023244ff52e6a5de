"""A tiny LLaVA-NeXT on disk with a real processor."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
)

from pitome_vlm.demo.processor import CHAT_TEMPLATE, IMAGE, build_processor, vocabulary

TILE, PATCH = 60, 10
PINS = [[60, 120], [120, 60], [120, 120], [60, 180], [180, 60]]


def anyres_processor() -> LlavaNextProcessor:
    """Tiles of 6 x 6 patches, the demo's words."""
    images = LlavaNextImageProcessor(
        size={"shortest_edge": TILE},
        crop_size={"height": TILE, "width": TILE},
        image_grid_pinpoints=PINS,
    )
    return LlavaNextProcessor(
        image_processor=images,
        tokenizer=build_processor().tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=CHAT_TEMPLATE,
    )


def anyres_checkpoint_model() -> LlavaNextForConditionalGeneration:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=TILE,
        patch_size=PATCH,
        projection_dim=16,
    )
    text = LlamaConfig(
        vocab_size=len(vocabulary()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_grid_pinpoints=PINS,
    )
    return LlavaNextForConditionalGeneration(config).eval()


def save_anyres_checkpoint(folder: Path) -> Path:
    anyres_checkpoint_model().save_pretrained(folder)
    anyres_processor().save_pretrained(folder)
    return folder
