"""A tiny LLaVA on disk with a real processor, and ways to damage it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from pitome_vlm.demo.processor import IMAGE, IMAGE_SIZE, PATCH_SIZE, build_processor, vocabulary

WEIGHTS = "model.safetensors"


def tiny_config(dtype: torch.dtype | None = None) -> LlavaConfig:
    """The demo's image size and vocabulary, a fraction of its width."""
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=16,
    )
    text = LlamaConfig(
        vocab_size=len(vocabulary()),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    if dtype is not None:
        config.dtype = dtype
    return config


def save_checkpoint(folder: Path) -> Path:
    torch.manual_seed(0)
    LlavaForConditionalGeneration(tiny_config()).save_pretrained(folder)
    build_processor().save_pretrained(folder)
    # LLaVA's own tokenizers have no segments; the generic class of transformers 4.57 adds them.
    edit_json(folder / "tokenizer_config.json", model_input_names=["input_ids", "attention_mask"])
    return folder


def edit_json(file: Path, **changes) -> None:
    """Set keys of a JSON file; None removes one."""
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def edit_weights(folder: Path, edit) -> None:
    """Replace {name: tensor} by `edit` of it."""
    file = folder / WEIGHTS
    weights = {name: tensor.clone() for name, tensor in edit(load_file(file)).items()}
    save_file(weights, file, {"format": "pt"})
