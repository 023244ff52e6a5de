"""Image processors of the tiny models of families, and what the family's processor writes.

No processor is loaded: those of families that take videos need torchvision. What is written for an
image is a method of the processor's class, which is called on a stand-in.
"""

from __future__ import annotations

import random

import numpy as np
import transformers as hf
from checkpoint_families import images
from PIL import Image

MARK = "<image>"
# (height, width): tiny, huge, long and thin, and whatever comes.
_DRAW = random.Random(5)
SIZES = [(1, 1), (3, 2), (1500, 8), (8, 1500), (1200, 1000), (64, 64), (63, 65), (32, 128)]
SIZES += [(_DRAW.randint(20, 260), _DRAW.randint(20, 260)) for _ in range(12)]

_PACKED = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
_LIMITS = {"shortest_edge": 16 * 16, "longest_edge": 96 * 96}
_QWEN = ("Qwen2VL", {"size": _LIMITS, **_PACKED})
_GLM_LIMITS = {"shortest_edge": 2 * 32 * 32, "longest_edge": 2 * 96 * 96}
# Processors of InternVL and Aya pass crop_to_patches themselves.
_TILES = {"size": {"height": 64, "width": 64}, "max_patches": 6}
_IDEFICS = {"size": {"longest_edge": 256}, "max_image_size": {"longest_edge": 64}}
_PAN = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 16}
_PAN |= {"pan_and_scan_max_num_crops": 4, "pan_and_scan_min_ratio_to_activate": 1.2}
_CROPS = {"patch_size": 4, "overlap_margins": [1, 1]}
_NO_COLUMNS = {"use_single_crop_col_tokens": False, "use_single_crop_start_token": True}
_ONE = {"size": {"height": 32, "width": 32}}

# Options that leave an image's size alone, for families whose formula knows no limits.
ANY_SIZE = {"shortest_edge": 1, "longest_edge": 10**8}
UNLIMITED = {name: {"size": ANY_SIZE} for name in ("qwen3_vl", "glm4v", "glm46v", "paddleocr_vl")}
UNLIMITED |= {"qwen2_5_vl": {"size": ANY_SIZE}, "lighton_ocr": {}}
UNLIMITED |= {"video_llama_3": {"size": ANY_SIZE, "merge_size": 1}, "mistral3": {}}
UNLIMITED |= {"kimi_k25": {"max_patches": 10**6}}
_TOKENS = {"min_image_tokens": 1, "max_image_tokens": 20_000}
UNLIMITED |= {"lfm2_vl": {"do_image_splitting": False, **_TOKENS}}

# By model type: image processor and its options; the processor, and what of it is needed.
TABLE = {
    "qwen2_5_vl": (*_QWEN, "Qwen2_5_VL", {}),
    "qwen3_vl": (*_QWEN, "Qwen3VL", {}),
    "glm4v": ("Glm4v", {"size": _GLM_LIMITS, **_PACKED}, "Glm4v", {}),
    "glm46v": ("Glm46V", {"size": _GLM_LIMITS, **_PACKED}, "Glm46V", {}),
    "paddleocr_vl": (
        *("PaddleOCRVL", {"size": _LIMITS, **_PACKED, "temporal_patch_size": 1}),
        *("PaddleOCRVL", {}),
    ),
    "video_llama_3": (
        *("VideoLlama3", {"size": _LIMITS, **_PACKED, "temporal_patch_size": 1}),
        *("VideoLlama3", {}),
    ),
    "internvl": ("GotOcr2", _TILES, "InternVL", {"image_seq_length": 16}),
    "idefics3": ("Idefics3", _IDEFICS, "Idefics3", {"image_seq_len": 16}),
    "smolvlm": ("SmolVLM", _IDEFICS, "SmolVLM", {"image_seq_len": 16}),
    "aya_vision": (
        *("GotOcr2", _TILES, "AyaVision"),
        {"img_size": 64, "patch_size": 16, "img_patch_token": MARK},
    ),
    "gemma3": (
        *("Gemma3", {"size": {"height": 64, "width": 64}}, "Gemma3"),
        {"image_seq_length": 16, "full_image_sequence": MARK * 16, "images_kwargs": _PAN},
    ),
    "gemma4": ("Gemma4", {"patch_size": 4, "max_soft_tokens": 70}, "Gemma4", {}),
    "paligemma": ("Siglip", _ONE, "PaliGemma", {"image_seq_length": 16}),
    "deepseek_vl": (
        *("DeepseekVL", _ONE | {"min_size": 14}),
        *("DeepseekVL", {"num_image_tokens": 16}),
    ),
    "mistral3": (
        *("Pixtral", {"size": {"longest_edge": 64}, "patch_size": 8}),
        *("Pixtral", {"patch_size": 4, "spatial_merge_size": 2}),
    ),
    "lighton_ocr": (
        *("Pixtral", {"size": {"longest_edge": 64}, "patch_size": 8}),
        *("LightOnOcr", {"effective_patch_size": 8}),
    ),
    "ovis2": (
        *("Ovis2", {"size": {"height": 64, "width": 64}, "crop_to_patches": True}),
        *("Ovis2", {"image_seq_length": 16}),
    ),
    "minicpmv4_6": (
        *("MiniCPMV4_6", {"patch_size": 2, "scale_resolution": 64, "max_slice_nums": 4}),
        *("MiniCPMV4_6", {"slice_mode": True}),
    ),
    # Their image processors need torchvision.
    "cohere2_vision": (
        *("Cohere2Vision", _TILES | {"patch_size": 4, "crop_to_patches": True}),
        *("Cohere2Vision", {"patch_size": 4}),
    ),
    "kimi_k25": (
        *("Kimi_K25", {"patch_size": 4, "merge_size": 2, "max_patches": 144}),
        *("Kimi_K25", {}),
    ),
    "molmo2": (
        *(
            "Molmo2",
            {"size": {"height": 28, "width": 28}, "patch_size": 4, "overlap_margins": [1, 1]},
        ),
        *("Molmo2", {"image_use_col_tokens": True, **_NO_COLUMNS}),
    ),
    "lfm2_vl": ("Lfm2Vl", {"encoder_patch_size": 4, "tile_size": 32}, "Lfm2Vl", {}),
}
# Pixtral's processor, and the image processors of the others.
NEEDS_TORCHVISION = ("mistral3", "cohere2_vision", "kimi_k25", "molmo2", "lfm2_vl")
# What a method of a processor may ask its own object for.
_NAMES = ("start_image_token", "end_image_token", "fake_image_token", "global_image_tag")
_NAMES += ("global_image_token", "image_break_token", "image_end_token", "start_of_img_token")
_NAMES += ("end_of_img_token", "tile_token", "tile_global_token", "boi_token", "eoi_token")
_NAMES += ("img_line_break_token", "image_start_token", "slice_start_token", "slice_end_token")
_NAMES += ("image_thumbnail_token",)


def stand_in(name: str, **more):
    """An object of the processor's class that was not initialised.

    `more` are options of its image processor.
    """
    prepare, options, kind, values = TABLE[name]
    made = object.__new__(getattr(hf, f"{kind}Processor"))
    for word in _NAMES:
        setattr(made, word, "|")
    made.image_processor, made.image_token = images(prepare, **options | more), MARK
    for word, value in values.items():
        setattr(made, word, value)
    return made


def written(processor, size: tuple[int, int]) -> str:
    """The text of one image (height, width) of noise."""
    pixels = np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8)
    options = processor._merge_kwargs()["images_kwargs"] | {"return_tensors": "pt"}
    given = processor.image_processor(images=[[Image.fromarray(pixels)]], **options)
    text = processor.replace_image_token(given, 0, image_token_divisor=16)
    for other in ("<IMG_ATOM>", "<im_patch>"):
        text = text.replace(other, MARK)
    return text


# Processors that say without an image how many tokens it has, separators not included.
ANNOUNCED = ("qwen2_5_vl", "qwen3_vl", "glm4v", "glm46v", "video_llama_3", "kimi_k25", "paligemma")
ANNOUNCED += ("lighton_ocr", "gemma4")
# Those that say how many tiles it has.
ANNOUNCED_TILES = ("internvl", "aya_vision", "cohere2_vision")


def announced(name: str, processor, size: tuple[int, int]):
    """(tokens, tiles) that the processor promises for an image; None for what it does not."""
    if name not in ANNOUNCED + ANNOUNCED_TILES:
        return None, None
    told = processor._get_num_multimodal_tokens(image_sizes=[list(size)])
    if name in ANNOUNCED:
        return told.num_image_tokens[0], None
    return None, told.num_image_patches[0]
