"""Tiny models whose processors fill patches to one length or say which of them a token pools."""

from __future__ import annotations

import torch
import transformers as hf
from tiny_families_packed import HYBRID, kinds
from tiny_families_tiles import GEMMA_SPREAD
from tiny_family import END, IMAGE, START, VIDEO, Family, Shown, joined, modality, text, vision

LINE, COLUMN, LOW, DIGIT, SLICE, SLICE_END, ID, ID_END = 95, 94, 93, 10, 92, 91, 90, 110
TILE_NAMES, THUMBNAIL = 100, 127


def patches(generator, real, full, channels):
    values = torch.zeros(full, channels)
    values[:real] = torch.rand(real, channels, generator=generator)
    return values


# LFM2-VL: a layer of convolutions, then one of attention. Patches are filled to 96. An image that
# is cut has tiles of 8 x 8 patches and after them the whole image, of a shape of its own.


def build_lfm2_vl():
    tower = {"patch_size": 4, "num_patches": 64, "vision_use_head": False}
    words = text("lfm2", layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False)
    config = hf.Lfm2VlConfig(
        vision_config=vision("siglip2_vision_model", **tower),
        text_config=words,
        image_token_id=IMAGE,
        projector_hidden_size=32,
    )
    return hf.Lfm2VlForConditionalGeneration(config)


def show_lfm2_vl(number, generator):
    rows, columns, height, width = ((1, 1, 8, 12), (1, 2, 8, 10), (1, 1, 8, 8))[number % 3]
    tiles = rows * columns if rows * columns > 1 else 0
    shapes = [(8, 8)] * tiles + [(height, width)]
    counts = tuple(h * w // 4 for h, w in shapes)
    ids = [START]
    for tile in range(tiles):
        ids += [TILE_NAMES + tile] + [IMAGE] * 16
    ids += [THUMBNAIL] * bool(tiles) + [IMAGE] * counts[-1] + [END]
    inputs = {
        "pixel_values": torch.stack([patches(generator, h * w, 96, 48) for h, w in shapes]),
        "pixel_attention_mask": torch.stack([(torch.arange(96) < h * w).int() for h, w in shapes]),
        "spatial_shapes": torch.tensor(shapes),
    }
    return Shown(ids, inputs, counts)


# Gemma 4: 9 patches per token, filled to 216 with positions of -1. Small models (E2B) have inputs
# for every layer and later layers that read the cache of earlier ones; in the large ones
# the tokens of an image see each other.

WINDOWS = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4}
WINDOWS |= {"sliding_window": 48, "final_logit_softcapping": 30.0, "global_head_dim": 16}
SMALL = {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "use_double_wide_mlp": True}
LARGE = {"hidden_size_per_layer_input": 0, "use_bidirectional_attention": "vision"}
LARGE |= {"attention_k_eq_v": True, "num_global_key_value_heads": 1}


def build_gemma4(**kind):
    tower = {"patch_size": 4, "num_key_value_heads": 4, "head_dim": 8, "pooling_kernel_size": 3}
    words = text("gemma4_text", vocab_size_per_layer_input=128, **WINDOWS, **(kind or SMALL))
    config = hf.Gemma4Config(
        vision_config=vision("gemma4_vision", position_embedding_size=64, **tower),
        text_config=words,
        audio_config=None,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=LINE,
        boi_token_id=START,
        eoi_token_id=END,
    )
    return hf.Gemma4ForConditionalGeneration(config)


def build_gemma4_large():
    return build_gemma4(**LARGE)


def show_gemma4(number, generator):
    height, width = ((12, 18), (15, 12), (12, 12))[number % 3]
    real, count = height * width, height * width // 9
    positions = torch.full((1, 216, 2), -1)
    row, column = torch.arange(real) // width, torch.arange(real) % width
    positions[0, :real] = torch.stack([column, row], dim=-1)
    inputs = {"pixel_values": patches(generator, real, 216, 48)[None]}
    inputs |= {"image_position_ids": positions}
    return Shown([START, *[IMAGE] * count, END], inputs, (count,))


# MiniCPM-V 4.6: 16 patches per token, all images in one row of patches. The whole image comes
# first, its slices after it; before them, the number of the image in its row of the batch.


def build_minicpmv4_6():
    config = hf.MiniCPMV4_6Config(
        vision_config=vision("minicpmv4_6_vision", patch_size=2, image_size=32),
        text_config=text("qwen3_5_text") | HYBRID,
        insert_layer_id=0,
        image_size=32,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    return hf.MiniCPMV4_6ForConditionalGeneration(config)


def show_minicpmv4_6(number, generator):
    slices, height, width = ((0, 16, 24), (2, 16, 20), (0, 16, 16))[number % 3]
    sizes = [(height, width)] + [(16, 16)] * slices
    counts = tuple(h * w // 16 for h, w in sizes)
    ids = [START, *[IMAGE] * counts[0], END]
    ids += [SLICE, *[IMAGE] * 16, SLICE_END, LINE] * slices
    ids = ids[:-1] if slices else ids
    values = torch.randn(1, 3, 2, 2 * sum(h * w for h, w in sizes), generator=generator)
    inputs = {"pixel_values": values}
    inputs |= {"target_sizes": torch.tensor(sizes, dtype=torch.int32)}
    return Shown(ids, inputs, counts)


def label_minicpmv4_6(place):
    return [ID, DIGIT + place, ID_END]


def collate_minicpmv4_6(rows):
    values = torch.cat([one.inputs["pixel_values"] for row in rows for one in row], dim=-1)
    sizes = torch.cat([one.inputs["target_sizes"] for row in rows for one in row])
    return {"pixel_values": values, "target_sizes": sizes}


# Molmo 2: crops of 7 x 7 patches that overlap by 2; every token is told which patches it pools
# (-1 for none), first in the whole image, then in the crops. Every row of tokens ends with a
# token for its column. The placeholder is outside of `vocab_size`, in the additional vocabulary,
# and features are added to its embedding. All tokens of all images of a row see each other.

CROP, STEP = 7, 5


def build_molmo2():
    sizes = {"num_key_value_heads": 4, "head_dim": 8, "hidden_size": 32, "intermediate_size": 64}
    sizes |= {"num_attention_heads": 4}
    words = text("molmo2_text", vocab_size=90, additional_vocab_size=38)
    config = hf.Molmo2Config(
        vision_config=sizes | {"num_hidden_layers": 2, "image_size": [28, 28], "patch_size": 4},
        adapter_config=sizes | {"vision_feature_layer": [1, 0], "text_hidden_size": 32},
        text_config=words,
        image_start_token_id=START,
        image_end_token_id=END,
        low_res_image_start_token_id=LOW,
        image_patch_id=IMAGE,
        frame_start_token_id=92,
        frame_end_token_id=91,
    )
    return hf.Molmo2ForConditionalGeneration(config)


def pooled(height, width, patch_at):
    """[tokens, 4]: the patches of every 2 x 2 window, -1 outside of height x width."""

    def patch(row, column):
        return patch_at(row, column) if row < height and column < width else -1

    windows = [
        [patch(row + i, column + j) for i in range(2) for j in range(2)]
        for row in range(0, height, 2)
        for column in range(0, width, 2)
    ]
    return torch.tensor(windows, dtype=torch.int32)


def show_molmo2(number, generator):
    crops = (1, 2, 1)[number % 3]
    width = CROP + STEP * (crops - 1)

    def in_crop(row, column):
        # Of two crops that overlap, each gives the half of the overlap that is nearer to it.
        crop = min(max(column - 1, 0) // STEP, crops - 1)
        return CROP * CROP * (1 + crop) + row * CROP + column - STEP * crop

    whole = pooled(CROP, CROP, lambda row, column: row * CROP + column)
    detail = pooled(CROP, width, in_crop)
    columns = (width + 1) // 2
    ids = [LOW, *([*[IMAGE] * 4, COLUMN] * 4), END, START]
    ids += [*([*[IMAGE] * columns, COLUMN] * 4), END]
    inputs = {
        "pixel_values": torch.randn(1 + crops, CROP * CROP, 48, generator=generator),
        "image_token_pooling": torch.cat([whole, detail]),
        "image_grids": torch.tensor([[4, 4, 4, columns]]),
        "image_num_crops": torch.tensor([1 + crops]),
    }
    return Shown(ids, inputs, (16, 4 * columns))


def collate_molmo2(rows):
    shown = [one.inputs for row in rows for one in row]
    before, places = 0, []
    for one in shown:
        place = one["image_token_pooling"]
        places.append(torch.where(place >= 0, place + before, place))
        before += one["pixel_values"].shape[:2].numel()
    return joined(rows) | {"image_token_pooling": torch.cat(places)}


marked = modality("mm_token_type_ids", IMAGE, COLUMN, LOW, START, END)

PADDED = {
    "lfm2_vl": Family(build_lfm2_vl, show_lfm2_vl),
    "gemma4": Family(build_gemma4, show_gemma4, more=kinds, spread=GEMMA_SPREAD),
    "minicpmv4_6": Family(
        build_minicpmv4_6, show_minicpmv4_6, collate=collate_minicpmv4_6, label=label_minicpmv4_6
    ),
    "molmo2": Family(build_molmo2, show_molmo2, more=marked, collate=collate_molmo2),
}
VARIANTS = {
    "gemma4, large": Family(build_gemma4_large, show_gemma4, more=kinds, spread=GEMMA_SPREAD)
}
