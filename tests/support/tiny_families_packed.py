"""Tiny models of families whose images keep their shape, and their processors' batches."""

from __future__ import annotations

import inspect

import torch
import transformers as hf
from tiny_family import (
    END,
    IMAGE,
    START,
    VIDEO,
    VOCABULARY,
    Family,
    Shown,
    modality,
    nothing_more,
    text,
    vision,
)

GRIDS = ((8, 12), (10, 8), (8, 8))  # rows and columns of patches
TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO}
UNTIED = {"tie_word_embeddings": False}
MARKS = {"vision_start_token_id": START, "vision_end_token_id": END}


def show_grid(number, generator, *, patch=(3 * 2 * 4 * 4,), before=(START,), after=(END,)):
    """Patches in the order of the model (four of them become one token) and their grid."""
    height, width = GRIDS[number % 3]
    count = height * width // 4
    values = torch.randn(height * width, *patch, generator=generator)
    inputs = {"pixel_values": values, "image_grid_thw": torch.tensor([[1, height, width]])}
    return Shown([*before, *[IMAGE] * count, *after], inputs, (count,))


def mrope(*sections, **more):
    rope = {"rope_type": "default", "mrope_section": list(sections)} | more
    if "rope_parameters" in inspect.signature(hf.Qwen2Config).parameters:
        return {"rope_parameters": rope | {"rope_theta": 1e4}}
    partial = {name: rope.pop(name) for name in ("partial_rotary_factor",) if name in rope}
    return {"rope_scaling": rope, "rope_theta": 1e4} | partial  # Before release 5.


def interleaved(**more):
    return mrope(2, 1, 1, mrope_interleaved=True, **more)


def qwen3_tower(model_type, **more):
    tower = vision(model_type, depth=2, num_heads=4, patch_size=4, out_hidden_size=32)
    del tower["num_hidden_layers"], tower["num_attention_heads"]
    return tower | {"num_position_embeddings": 64} | more


# Qwen3-VL: features of inner vision layers are added after the first layers of the language model.


def build_qwen3_vl(kind="Qwen3VL", name="qwen3_vl", **experts):
    deep = {"depth": 3, "deepstack_visual_indexes": [0, 1]}
    config = getattr(hf, f"{kind}Config")(
        vision_config=qwen3_tower(f"{name}_vision", **deep),
        text_config=text(f"{name}_text", num_hidden_layers=3, **interleaved(), **experts),
        **TOKENS,
        **MARKS,
    )
    return getattr(hf, f"{kind}ForConditionalGeneration")(config)


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def build_qwen3_vl_moe():
    return build_qwen3_vl("Qwen3VLMoe", "qwen3_vl_moe", **EXPERTS)


# Qwen3.5: a layer of linear attention, then a layer of full attention.

HYBRID = {"layer_types": ["linear_attention", "full_attention"], "linear_conv_kernel_dim": 4}
HYBRID |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "head_dim": 16}
HYBRID |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
HYBRID |= interleaved(partial_rotary_factor=0.5)


def build_qwen3_5(kind="Qwen3_5", name="qwen3_5", **experts):
    config = getattr(hf, f"{kind}Config")(
        vision_config=qwen3_tower(f"{name}_vision"),
        text_config=text(f"{name}_text") | HYBRID | experts,
        **TOKENS,
        **MARKS,
    )
    return getattr(hf, f"{kind}ForConditionalGeneration")(config)


def build_qwen3_5_moe():
    shared = {"shared_expert_intermediate_size": 16}
    return build_qwen3_5("Qwen3_5Moe", "qwen3_5_moe", **EXPERTS, **shared)


# GLM-4.1V, 4.5V and 4.6V: images and frames have one placeholder; a convolution makes four patches
# one token.

GLM_MARKS = {"image_start_token_id": START, "image_end_token_id": END}
GLM_MARKS |= {"video_start_token_id": 95, "video_end_token_id": 94}
GLM_ROPE = mrope(2, 1, 1, partial_rotary_factor=0.5)


def build_glm4v(kind="Glm4v", tower="glm4v_vision", words="glm4v_text", **experts):
    size = {"depth": 2, "num_heads": 4, "patch_size": 4, "image_size": 32, "out_hidden_size": 32}
    size |= {"model_type": tower, "hidden_size": 32, "intermediate_size": 64}
    config = getattr(hf, f"{kind}Config")(
        vision_config=size,
        text_config=text(words, **GLM_ROPE) | {"head_dim": 16} | experts,
        **TOKENS,
        **GLM_MARKS,
    )
    return getattr(hf, f"{kind}ForConditionalGeneration")(config)


def build_glm46v():
    return build_glm4v("Glm46V")


def build_glm4v_moe():
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    return build_glm4v("Glm4vMoe", "glm4v_moe_vision", "glm4v_moe_text", **experts)


# PaddleOCR-VL: patches of [3, 4, 4] and one frame.


def build_paddleocr_vl():
    config = hf.PaddleOCRVLConfig(
        vision_config=vision("paddleocr_vl_vision", patch_size=4, image_size=32),
        text_config=text("paddleocr_vl_text", **UNTIED, **mrope(2, 1, 1)),
        **UNTIED,
        **TOKENS,
        **MARKS,
    )
    return hf.PaddleOCRVLForConditionalGeneration(config)


# VideoLLaMA 3: Qwen's packing with plain positions; the number of patches per token is an input.


def build_video_llama_3():
    config = hf.VideoLlama3Config(
        vision_config=vision("video_llama_3_vision", patch_size=4),
        text_config=text("qwen2", **UNTIED),
        **TOKENS,
    )
    return hf.VideoLlama3ForConditionalGeneration(config)


def show_video_llama_3(number, generator):
    shown = show_grid(number, generator, patch=(3 * 4 * 4,), before=(), after=())
    shown.inputs["image_merge_sizes"] = torch.tensor([2])
    return shown


# Kimi K2.5: patches row by row; a dense layer, then a layer of experts. The placeholder of videos
# is outside of the vocabulary.

LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
LATENT |= {"v_head_dim": 8, "num_key_value_heads": 4, "first_k_dense_replace": 1}
LATENT |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT |= {"n_group": 1, "topk_group": 1}


def build_kimi_k25():
    tower = {"patch_size": 4, "pos_emb_height": 8, "pos_emb_width": 8}
    words = {name: value for name, value in text("deepseek_v3").items() if name != "head_dim"}
    config = hf.Kimi_K25Config(
        vision_config=vision("kimi_k25_vision", **tower),
        text_config=words | LATENT,
        projection_hidden_size=32,
        image_token_id=IMAGE,
        video_token_id=VOCABULARY,
        **UNTIED,
        **MARKS,
    )
    return hf.Kimi_K25ForConditionalGeneration(config)


def show_kimi_k25(number, generator):
    return show_grid(number, generator, patch=(3, 4, 4), before=(START, 95, 94))


# Mistral 3: a break token after every row of tokens, an end token after the last.

BREAK = 95


def build_mistral3():
    config = hf.Mistral3Config(
        vision_config=vision("pixtral", patch_size=4, image_size=64),
        text_config=text("mistral", sliding_window=None),
        image_token_index=IMAGE,
        spatial_merge_size=2,
        **UNTIED,
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


# Pixtral: the same in LLaVA's class, a token per patch.


def build_pixtral():
    config = hf.LlavaConfig(
        vision_config=vision("pixtral", patch_size=8, image_size=64),
        text_config=text("mistral", sliding_window=None),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        **UNTIED,
    )
    return hf.LlavaForConditionalGeneration(config)


# LightOnOCR: Pixtral's tower without break tokens.


def build_lighton_ocr():
    config = hf.LightOnOcrConfig(
        vision_config=vision("pixtral", patch_size=4, image_size=64),
        text_config=text("qwen3"),
        image_token_id=IMAGE,
        spatial_merge_size=2,
    )
    return hf.LightOnOcrForConditionalGeneration(config)


def show_lighton_ocr(number, generator):
    shown = show_mistral3(number, generator)
    return Shown([IMAGE] * shown.tiles[0], shown.inputs, shown.tiles)


def show_paddleocr_vl(number, generator):
    return show_grid(number, generator, patch=(3, 4, 4))


FORWARD = inspect.signature(hf.Qwen2VLForConditionalGeneration.forward).parameters
# Processors return the kinds of tokens since models take them (release 5).
kinds = modality("mm_token_type_ids") if "mm_token_type_ids" in FORWARD else nothing_more

PACKED = {
    "qwen3_vl": Family(build_qwen3_vl, show_grid, more=kinds),
    "qwen3_vl_moe": Family(build_qwen3_vl_moe, show_grid, more=kinds),
    "qwen3_5": Family(build_qwen3_5, show_grid, more=kinds),
    "qwen3_5_moe": Family(build_qwen3_5_moe, show_grid, more=kinds),
    "glm4v": Family(build_glm4v, show_grid, more=kinds),
    "glm46v": Family(build_glm46v, show_grid, more=kinds),
    "glm4v_moe": Family(build_glm4v_moe, show_grid, more=kinds),
    "paddleocr_vl": Family(build_paddleocr_vl, show_paddleocr_vl, more=kinds),
    "video_llama_3": Family(build_video_llama_3, show_video_llama_3),
    "kimi_k25": Family(build_kimi_k25, show_kimi_k25),
    "mistral3": Family(build_mistral3, show_mistral3, collate=collate_mistral3),
    "llava, pixtral": Family(build_pixtral, show_mistral3, collate=collate_mistral3),
    "lighton_ocr": Family(build_lighton_ocr, show_lighton_ocr, collate=collate_mistral3),
}
