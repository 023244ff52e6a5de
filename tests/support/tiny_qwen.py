"""Tiny Qwen2-VL and Qwen2.5-VL models with random weights."""

from __future__ import annotations

import inspect
import math

import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

IMAGE, VIDEO, START, PATCH = 99, 98, 97, 14


def qwen(kind="qwen2_5_vl", *, seed=0):
    torch.manual_seed(seed)
    words = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 64}
    words |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    words |= {"max_position_embeddings": 4096, "pad_token_id": 0, "bos_token_id": 1}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3]}
    newer = (
        "rope_parameters" in inspect.signature(type(Qwen2VLConfig().get_text_config())).parameters
    )
    words |= {"rope_parameters": rope | {"rope_theta": 1e4}} if newer else {"rope_scaling": rope}
    vision = {"depth": 3, "num_heads": 4, "patch_size": PATCH, "temporal_patch_size": 2}
    vision |= {"spatial_merge_size": 2}
    tokens = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START}
    if kind == "qwen2_vl":
        vision |= {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
        config = Qwen2VLConfig(text_config=words, vision_config=vision, **tokens)
        model = Qwen2VLForConditionalGeneration(config).eval()
    else:
        vision |= {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 64}
        vision |= {"window_size": 56, "fullatt_block_indexes": [2]}
        config = Qwen2_5_VLConfig(text_config=words, vision_config=vision, **tokens)
        model = Qwen2_5_VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.0 if "embed_tokens" in name or "lm_head" in name else 0.2)
        model.lm_head.weight[[IMAGE, VIDEO, START]] = 0
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def pixels(grids, seed=1):
    generator = torch.Generator().manual_seed(seed)
    total = sum(math.prod(grid) for grid in grids)
    return torch.randn(total, 3 * 2 * PATCH * PATCH, generator=generator)


def qwen_batch(model, rows, texts=(5, 9), *, side="left", kind="image", seed=1):
    """Row i shows images with the grids `rows[i]`."""
    generator = torch.Generator().manual_seed(seed)
    token = {"image": IMAGE, "video": VIDEO}[kind]

    def words(n):
        return torch.randint(3, 90, (n,), generator=generator).tolist()

    lines = []
    for row, text in zip(rows, texts, strict=False):
        line = words(2)
        for grid in row:
            line += [START] + [token] * (math.prod(grid) // 4) + words(2)
        lines.append(line + words(text))
    width = max(map(len, lines))
    ids = torch.zeros(len(lines), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, line in enumerate(lines):
        place = slice(width - len(line), None) if side == "left" else slice(len(line))
        ids[i, place], mask[i, place] = torch.tensor(line), 1
    batch = {"input_ids": ids, "attention_mask": mask}
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        batch["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    grids = [grid for row in rows for grid in row]
    if grids:
        name = "pixel_values" if kind == "image" else "pixel_values_videos"
        batch |= {name: pixels(grids), f"{kind}_grid_thw": torch.tensor(grids)}
    return batch
