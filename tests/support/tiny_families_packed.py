"""Tiny models of families whose images keep their shape, and their processors' batches."""

from __future__ import annotations

import torch
import transformers as hf
from tiny_family import END, IMAGE, START, VIDEO, Family, Shown, modality, text, vision

GRIDS = ((8, 12), (10, 8), (8, 8))  # rows and columns of patches
TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO}
MARKS = {"vision_start_token_id": START, "vision_end_token_id": END}


def show_qwen(number, generator, *, patch=4):
    """Patches of two equal frames in the order in which four of them become one token."""
    height, width = GRIDS[number % 3]
    count = height * width // 4
    values = torch.randn(height * width, 3 * 2 * patch * patch, generator=generator)
    inputs = {"pixel_values": values, "image_grid_thw": torch.tensor([[1, height, width]])}
    return Shown([START, *[IMAGE] * count, END], inputs, (count,))


def mrope(*sections, **more):
    return {"rope_parameters": {"rope_theta": 1e4, "mrope_section": list(sections)} | more}


def interleaved(**more):
    return mrope(2, 1, 1, rope_type="default", mrope_interleaved=True, **more)


def qwen3_tower(model_type, **more):
    tower = vision(model_type, depth=2, num_heads=4, patch_size=4, out_hidden_size=32)
    del tower["num_hidden_layers"], tower["num_attention_heads"]
    return tower | {"num_position_embeddings": 64} | more


# Qwen3-VL: features of inner vision layers are added after the first layers of the language model.


def build_qwen3_vl():
    config = hf.Qwen3VLConfig(
        vision_config=qwen3_tower("qwen3_vl_vision", depth=3, deepstack_visual_indexes=[0, 1]),
        text_config=text("qwen3_vl_text", num_hidden_layers=3, **interleaved()),
        **TOKENS,
        **MARKS,
    )
    return hf.Qwen3VLForConditionalGeneration(config)


# Qwen3.5: a layer of linear attention, then a layer of full attention.

HYBRID = {"layer_types": ["linear_attention", "full_attention"], "linear_conv_kernel_dim": 4}
HYBRID |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
HYBRID |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}


def build_qwen3_5():
    words = text("qwen3_5_text", **HYBRID, **interleaved(partial_rotary_factor=0.5))
    config = hf.Qwen3_5Config(
        vision_config=qwen3_tower("qwen3_5_vision"),
        text_config=words | {"head_dim": 16},
        **TOKENS,
        **MARKS,
    )
    return hf.Qwen3_5ForConditionalGeneration(config)


# GLM-4.1V: images and frames have one placeholder; a convolution makes four patches one token.

GLM_MARKS = {"image_start_token_id": START, "image_end_token_id": END}
GLM_MARKS |= {"video_start_token_id": 95, "video_end_token_id": 94}


def build_glm4v():
    tower = {"depth": 2, "num_heads": 4, "patch_size": 4, "image_size": 32, "out_hidden_size": 32}
    tower |= {"model_type": "glm4v_vision", "hidden_size": 32, "intermediate_size": 64}
    config = hf.Glm4vConfig(
        vision_config=tower,
        text_config=text("glm4v_text", **mrope(2, 1, 1, rope_type="default")),
        **TOKENS,
        **GLM_MARKS,
    )
    return hf.Glm4vForConditionalGeneration(config)


# Mistral 3: a break token after every row of tokens, an end token after the last.

BREAK = 95


def build_mistral3():
    config = hf.Mistral3Config(
        vision_config=vision("pixtral", patch_size=4, image_size=64),
        text_config=text("mistral", sliding_window=None),
        image_token_index=IMAGE,
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    return hf.Mistral3ForConditionalGeneration(config)


def show_mistral3(number, generator, *, pixels_per_token=8):
    height, width = (side // 2 for side in GRIDS[number % 3])
    ids = ([IMAGE] * width + [BREAK]) * height
    size = height * pixels_per_token, width * pixels_per_token
    inputs = {"pixel_values": torch.randn(1, 3, *size, generator=generator)}
    inputs |= {"image_sizes": torch.tensor([size])}
    return Shown([*ids[:-1], END], inputs, (height * width,))


def collate_mistral3(rows):
    """Pixels of smaller images are filled to the largest height and width."""
    shown = [one.inputs for row in rows for one in row]
    sizes = torch.cat([one["image_sizes"] for one in shown])
    values = torch.zeros(len(shown), 3, *sizes.amax(dim=0).tolist())
    for i, one in enumerate(shown):
        height, width = sizes[i].tolist()
        values[i, :, :height, :width] = one["pixel_values"]
    return {"pixel_values": values, "image_sizes": sizes}


kinds = modality("mm_token_type_ids")

PACKED = {
    "qwen3_vl": Family(build_qwen3_vl, show_qwen, more=kinds),
    "qwen3_5": Family(build_qwen3_5, show_qwen, more=kinds),
    "glm4v": Family(build_glm4v, show_qwen, more=kinds),
    "mistral3": Family(build_mistral3, show_mistral3, collate=collate_mistral3),
}
