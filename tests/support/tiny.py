"""Tiny LLaVAs with random weights, and batches in the format of their processors."""

from __future__ import annotations

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

IMAGE = 99
PATCHES = 144
KINDS = ("clip", "clip_full", "siglip", "siglip_default", "vipllava", "clip_list")


def _spread(name: str) -> float:
    """Standard deviations with which answers depend on words, pixels and merging."""
    if "embed_tokens" in name or "lm_head" in name:
        return 1.0
    return 0.4 if "language_model" in name else 0.2


def tiny_model(
    kind: str = "clip",
    *,
    seed: int = 0,
    layers: int = 6,
    attention: str = "sdpa",
    text_layers: int = 2,
):
    """A LLaVA of 12 x 12 patches. Weights are large enough for outputs to differ by input."""
    torch.manual_seed(seed)
    size = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "image_size": 96,
        "patch_size": 8,
    }
    siglip = kind.startswith("siglip")
    vision = SiglipVisionConfig(**size) if siglip else CLIPVisionConfig(**size, projection_dim=16)
    text = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=text_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    options = {"vision_config": vision, "text_config": text, "image_token_index": IMAGE}
    config_class, model_class = LlavaConfig, LlavaForConditionalGeneration
    if kind == "vipllava":
        config_class, model_class = VipLlavaConfig, VipLlavaForConditionalGeneration
        config = config_class(**options)
        name = (
            "vision_feature_layer"
            if hasattr(config, "vision_feature_layer")
            else "vision_feature_layers"
        )
        setattr(config, name, [-2, -3, 2])
    else:
        if kind == "clip_list":
            options["vision_feature_layer"] = [-2, 3]
        if kind in ("clip_full", "siglip"):
            options["vision_feature_select_strategy"] = "full"
        config = config_class(**options)
    config.pad_token_id = 0
    config._attn_implementation = attention
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, _spread(name))
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def tokens_per_image(kind: str) -> int:
    return {"clip_full": PATCHES + 1, "siglip_default": PATCHES - 1}.get(kind, PATCHES)


def tiny_batch(
    kind: str = "clip", images=(1, 2), texts=(5, 9), *, side: str = "left", seed: int = 1
):
    """`images[i]` images and `texts[i]` closing words in row i, padded on `side`."""
    generator = torch.Generator().manual_seed(seed)

    def words(n):
        return torch.randint(3, 90, (n,), generator=generator).tolist()

    rows = []
    for count, text in zip(images, texts, strict=True):
        row = [1]
        for _ in range(count):
            row += words(3) + [IMAGE] * tokens_per_image(kind)
        rows.append(row + words(text))
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(width - len(row), None) if side == "left" else slice(len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    batch = {"input_ids": ids, "attention_mask": mask}
    if sum(images):
        batch["pixel_values"] = torch.randn(sum(images), 3, 96, 96, generator=generator)
    return batch


def duplicated_image(model):
    """Pixels and a tower in which every patch has exactly one equal: no position embedding."""
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "position_embedding"):
                module.position_embedding.weight.zero_()
    blocks = torch.randn(1, 3, 12, 6, 8, 8, generator=torch.Generator().manual_seed(3))
    blocks = blocks.repeat_interleave(2, dim=3)  # neighbours in a row are equal
    return blocks.permute(0, 1, 2, 4, 3, 5).reshape(1, 3, 96, 96)
