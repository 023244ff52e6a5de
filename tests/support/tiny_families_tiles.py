"""Tiny models of families that cut images to squares of one size, and their processors' batches."""

from __future__ import annotations

import torch
import transformers as hf
from tiny_family import END, IMAGE, START, VOCABULARY, Family, Shown, modality, text, vision

LINE, GLOBAL, ROW_COLUMN = 95, 94, 100  # "\n", the whole image, and the first of the tiles' names
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 48}


def pixels(generator, *shape):
    return torch.randn(*shape, generator=generator)


def siglip(side: int, patch: int, **more):
    size = {"image_size": side, "patch_size": patch, "vision_use_head": False}
    return vision("siglip_vision_model", **size, **more)


# InternVL: 64 x 64 pixels, 8 x 8 patches, 4 x 4 tokens per tile; tiles follow each other without
# a separator, and several tiles are followed by the whole image.


def build_internvl():
    tower = {"image_size": [64, 64], "patch_size": [8, 8]}
    config = hf.InternVLConfig(
        vision_config=vision("internvl_vision", **tower),
        text_config=text("qwen2"),
        image_token_id=IMAGE,
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    return hf.InternVLForConditionalGeneration(config)


def show_internvl(number, generator):
    tiles = (1, 3, 1)[number % 3]
    ids = [START, *[IMAGE] * 16 * tiles, END]
    return Shown(ids, {"pixel_values": pixels(generator, tiles, 3, 64, 64)}, (16,) * tiles)


# Gemma 3: 64 x 64 pixels, 16 x 16 patches pooled to 4 x 4 tokens that see each other.


def build_gemma3():
    config = hf.Gemma3Config(
        vision_config=siglip(64, 4),
        text_config=text("gemma3_text", query_pre_attn_scalar=8, **SLIDING),
        mm_tokens_per_image=16,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )
    return hf.Gemma3ForConditionalGeneration(config)


def show_gemma3(number, generator):
    ids = [LINE, START, *[IMAGE] * 16, END, LINE]
    return Shown(ids, {"pixel_values": pixels(generator, 1, 3, 64, 64)}, (16,))


# PaliGemma: 4 x 4 tokens, no separators. All of the prompt, images first, sees itself.


def build_paligemma():
    config = hf.PaliGemmaConfig(
        vision_config=siglip(32, 8),
        text_config=text("gemma", num_key_value_heads=1),
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
        vocab_size=VOCABULARY,
    )
    return hf.PaliGemmaForConditionalGeneration(config)


def show_square(number, generator):
    return Shown([IMAGE] * 16, {"pixel_values": pixels(generator, 1, 3, 32, 32)}, (16,))


def paligemma_types(ids, mask):
    """1 would be the answer to train on; labels are what the processor makes of that."""
    return {"token_type_ids": torch.zeros_like(ids), "labels": torch.full_like(ids, -100)}


# SmolVLM and Idefics3: 64 x 64 pixels, 8 x 8 patches, 4 x 4 tokens per tile. One tile, or rows of
# tiles with the whole image after them. Rows of fewer tiles are filled with black ones.


def build_idefics(config_class, model_class, tower):
    config = config_class(
        vision_config=vision(tower, image_size=64, patch_size=8),
        text_config=text("llama"),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=0,
    )
    return model_class(config)


def build_smolvlm():
    classes = (hf.SmolVLMConfig, hf.SmolVLMForConditionalGeneration)
    return build_idefics(*classes, "smolvlm_vision")


def build_idefics3():
    classes = (hf.Idefics3Config, hf.Idefics3ForConditionalGeneration)
    return build_idefics(*classes, "idefics3_vision")


def show_idefics(number, generator):
    rows, columns = ((1, 2), (0, 0), (2, 2))[number % 3]
    ids = []
    for row in range(rows):
        for column in range(columns):
            ids += [START, ROW_COLUMN + 6 * row + column, *[IMAGE] * 16]
        ids.append(LINE)
    ids += [LINE] * bool(rows) + [START, GLOBAL, *[IMAGE] * 16, START]
    tiles = rows * columns + 1
    return Shown(ids, {"pixel_values": pixels(generator, tiles, 3, 64, 64)}, (16,) * tiles)


def collate_idefics(rows):
    tiles = [[one.inputs["pixel_values"] for one in row] for row in rows]
    counts = [sum(map(len, row)) for row in tiles]
    shape = len(rows), max(counts)
    values, mask = torch.zeros(*shape, 3, 64, 64), torch.zeros(*shape, 64, 64, dtype=torch.long)
    for i, row in enumerate(tiles):
        if row:
            values[i, : counts[i]], mask[i, : counts[i]] = torch.cat(row), 1
    return {"pixel_values": values, "pixel_attention_mask": mask}


# Aya Vision: 64 x 64 pixels, 8 x 8 patches, 4 x 4 tokens per tile; the whole image comes last.


def build_aya_vision():
    config = hf.AyaVisionConfig(
        vision_config=siglip(64, 8),
        text_config=text("cohere2", **SLIDING),
        image_token_index=IMAGE,
    )
    return hf.AyaVisionForConditionalGeneration(config)


def show_aya_vision(number, generator):
    tiles = (1, 3, 1)[number % 3]
    ids = [START]
    for tile in range(1, tiles):
        ids += [LINE, ROW_COLUMN + tile, *[IMAGE] * 16]
    ids += [GLOBAL, *[IMAGE] * 16, END]
    return Shown(ids, {"pixel_values": pixels(generator, tiles, 3, 64, 64)}, (16,) * tiles)


# Command A Vision: 4 x 4 tokens and a break per tile; the whole image comes last.


def build_cohere2_vision():
    config = hf.Cohere2VisionConfig(
        vision_config=siglip(64, 8),
        text_config=text("cohere2", **SLIDING),
        image_token_id=IMAGE,
        alignment_intermediate_size=64,
    )
    return hf.Cohere2VisionForConditionalGeneration(config)


def show_cohere2_vision(number, generator):
    tiles = (1, 3, 1)[number % 3]
    ids = [START, *([*[IMAGE] * 16, LINE] * tiles), END]
    return Shown(ids, {"pixel_values": pixels(generator, tiles, 3, 64, 64)}, (16,) * tiles)


# DeepSeek-VL: one token per patch and nothing around them.


def build_deepseek_vl():
    config = hf.DeepseekVLConfig(
        vision_config=siglip(32, 8),
        text_config=text("llama"),
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )
    return hf.DeepseekVLForConditionalGeneration(config)


# Ovis 2: 4 x 4 tokens per tile, each a mixture of visual words; the whole image comes first, and
# the tokens that mark the grid have visual words of their own.

START_GRID_COLUMN_ROW_END = (START, GLOBAL, LINE, 93, END)


def build_ovis2():
    tower = {"image_size": 64, "patch_size": 8, "hidden_stride": 2, "vocab_size": 64}
    config = hf.Ovis2Config(
        vision_config=vision("ovis2_vision", num_visual_indicator_tokens=5, **tower),
        text_config=text("qwen2"),
        image_token_id=IMAGE,
        visual_indicator_token_ids=list(START_GRID_COLUMN_ROW_END),
        vocab_size=VOCABULARY,
        hidden_size=32,
        tie_word_embeddings=False,
    )
    return hf.Ovis2ForConditionalGeneration(config)


def show_ovis2(number, generator):
    rows, columns = ((1, 1), (2, 2), (1, 2))[number % 3]
    start, grid, next_column, next_row, end = START_GRID_COLUMN_ROW_END
    ids = [start, *[IMAGE] * 16, grid]
    for row in range(rows if rows * columns > 1 else 0):
        for column in range(columns):
            ids += [IMAGE] * 16 + [next_column] * (column < columns - 1)
        ids += [next_row] * (row < rows - 1)
    tiles = 1 + rows * columns * (rows * columns > 1)
    inputs = {"pixel_values": pixels(generator, tiles, 3, 64, 64)}
    return Shown([*ids, end], inputs, (16,) * tiles)


# Gemma multiplies embeddings by sqrt(32); at a spread of 1 it would only repeat the last word.
GEMMA_SPREAD = {"embed_tokens": 0.1, "language_model": 0.5}

TILES = {
    "internvl": Family(build_internvl, show_internvl),
    "gemma3": Family(
        build_gemma3, show_gemma3, more=modality("token_type_ids"), spread=GEMMA_SPREAD
    ),
    "smolvlm": Family(build_smolvlm, show_idefics, collate=collate_idefics),
    "idefics3": Family(build_idefics3, show_idefics, collate=collate_idefics),
    "aya_vision": Family(build_aya_vision, show_aya_vision),
    "paligemma": Family(
        build_paligemma, show_square, more=paligemma_types, first=True, spread=GEMMA_SPREAD
    ),
    "cohere2_vision": Family(build_cohere2_vision, show_cohere2_vision),
    "deepseek_vl": Family(build_deepseek_vl, show_square),
    "ovis2": Family(build_ovis2, show_ovis2, spread={"visual_embeddings_table": 1.0}),
}
