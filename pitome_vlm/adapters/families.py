"""Families of models that differ in data only: one record each.

A record says which arguments belong to the pixels of an image and how many tokens it has. How the
features get into the prompt is left to the model's own forward (`generic.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .family import (
    Family,
    fitted,
    image_sizes,
    padded,
    patch_grids,
    rounded,
    square,
    tiles,
    tiles_that_hold_something,
    unhidden_tiles,
    vit_tokens,
)
from .grids import PIXELS, Grid, given, given_grids


def merge_size(config: Any) -> int:
    """Patches along a side of a token."""
    return int(config.vision_config.spatial_merge_size)


def merged_patches(config: Any) -> int:
    """Patches of a token."""
    return merge_size(config) ** 2


def merged_pixels(config: Any) -> int:
    """Pixels along a side of a token."""
    return int(config.vision_config.patch_size) * merge_size(config)


def _patch_size(config: Any) -> int:
    return int(config.vision_config.patch_size)


def _mistral_cell(config: Any) -> int:
    return int(config.vision_config.patch_size) * int(config.spatial_merge_size)


def _mistral_patches(config: Any) -> int:
    return int(config.spatial_merge_size) ** 2


def _own_merge_sizes(config: Any, inputs: Mapping[str, Any], kind: str) -> list[Grid]:
    """VideoLLaMA3: every image says how many patches become one token."""
    del config
    sides = given(inputs, f"{kind}_merge_sizes", kind)
    grids = given_grids(inputs, kind)
    if len(sides) != len(grids):
        raise ValueError(
            f"{kind}_merge_sizes are of {len(sides)} {kind}s, {kind}_grid_thw of {len(grids)}; "
            "pass both as the processor returned them"
        )
    return [(t, h // m, w // m) for (t, h, w), m in zip(grids, sides, strict=True)]


def _kimi_grids(config: Any, inputs: Mapping[str, Any], kind: str) -> list[Grid]:
    """Kimi pools over time and merges kernels of patches."""
    rows, columns = config.vision_config.merge_kernel_size
    return [(1, h // rows, w // columns) for _, h, w in given_grids(inputs, kind)]


def _molmo_grids(config: Any, inputs: Mapping[str, Any], kind: str) -> list[Grid]:
    """Molmo 2: the whole image and its crops, which are merged together."""
    del config
    grids = given(inputs, "image_grids", kind)
    pooling, patches = (
        inputs.get("image_token_pooling"),
        math.prod(inputs["pixel_values"].shape[:-1]),
    )
    if pooling is None or int(pooling.max()) >= patches:
        raise ValueError(
            f"image_token_pooling does not fit the {patches} patches of pixel_values; pass both "
            "as the processor returned them"
        )
    return [(1, 1, int(a * b + c * d)) for a, b, c, d in grids]


def _minicpm_cell(config: Any, mode: str | None = None) -> int:
    """Rows of patches that become one token; "4x" leaves out a layer that merges four to one."""
    whole = int(2 * config.merge_kernel_size[0] ** config.merger_times)
    return whole // 2 if (mode or config.downsample_mode) == "4x" else whole


def _minicpm_grids(config: Any, inputs: Mapping[str, Any], kind: str) -> list[Grid]:
    """MiniCPM-V: all images (slices, frames) share a row of patches."""
    name = {"image": "target_sizes", "video": "target_sizes_videos"}[kind]
    side, sizes = _minicpm_cell(config, inputs.get("downsample_mode")), given(inputs, name, kind)
    patches = inputs[PIXELS[kind]].shape[-1] // config.vision_config.patch_size
    if patches != sum(h * w for h, w in sizes):
        raise ValueError(
            f"{PIXELS[kind]} holds {patches} patches, but {name} describes "
            f"{sum(h * w for h, w in sizes)}; pass both as the processor returned them"
        )
    return [(1, h // side, w // side) for h, w in sizes]


def _gemma4_cell(config: Any) -> int:
    return int(config.vision_config.patch_size * config.vision_config.pooling_kernel_size)


def _gemma4_patches(config: Any, inputs: Mapping[str, Any], kind: str) -> list[Grid]:
    """Gemma 4: all images (frames) are filled up with patches whose place is (-1, -1)."""
    del config
    name, pixels = f"{kind}_position_ids", inputs[PIXELS[kind]]
    places = inputs.get(name)
    if places is None or places.shape[:2] != pixels.shape[:2]:
        found = "missing" if places is None else f"of {list(places.shape[:2])} {kind}s and patches"
        raise ValueError(
            f"{name} are {found}, {PIXELS[kind]} of {list(pixels.shape[:2])}; pass both as the "
            "processor returned them"
        )
    ends = (places.amax(1) + 1).tolist()
    if kind == "image":
        return [(1, rows, columns) for columns, rows in ends]
    grids, start = [], 0
    for frames in given(inputs, "num_frames_per_video", kind):
        columns, rows = ends[start]
        grids.append((int(frames), rows, columns))
        start += int(frames)
    return grids


def _gemma4_grids(config: Any, inputs: Mapping[str, Any], kind: str) -> list[Grid]:
    """The tokens of the same images."""
    side = config.vision_config.pooling_kernel_size
    patches = _gemma4_patches(config, inputs, kind)
    return [(frames, rows // side, columns // side) for frames, rows, columns in patches]


LAYER_CHOICE = ("vision_feature_layer", "vision_feature_select_strategy")
PATCH_GRIDS = {
    "image": ("pixel_values", "image_grid_thw"),
    "video": ("pixel_values_videos", "video_grid_thw"),
}
ROPE = ("mm_token_type_ids", "second_per_grid_ts")

FAMILIES = (
    Family(
        ("internvl",),
        tiles(lambda config: config.image_seq_length),
        inputs={"image": ("pixel_values", *LAYER_CHOICE)},
        tower="grid",
    ),
    Family(
        ("qwen3_vl", "qwen3_vl_moe"),
        patch_grids(merge_size),
        rounded(merged_pixels),
        PATCH_GRIDS,
        ROPE,
        levels="deepstack_features",
        patches=merged_patches,
        tower="units",
    ),
    Family(
        ("qwen3_5", "qwen3_5_moe"),
        patch_grids(merge_size),
        rounded(merged_pixels),
        PATCH_GRIDS,
        ROPE,
        patches=merged_patches,
        tower="units",
    ),
    Family(
        ("glm4v", "glm4v_moe", "glm46v"),
        patch_grids(merge_size),
        rounded(merged_pixels),
        PATCH_GRIDS,
        ROPE,
        patches=merged_patches,
        placeholders={"video": "image"},
        tower="units",
    ),
    Family(
        ("paddleocr_vl",),
        patch_grids(merge_size),
        rounded(merged_pixels),
        {"image": PATCH_GRIDS["image"]},
        ROPE,
        patches=merged_patches,
        tower="grid",
        tower_grids=patch_grids(lambda _: 1),
    ),
    Family(
        ("idefics3", "smolvlm"),
        tiles_that_hold_something(lambda config: vit_tokens(config, config.scale_factor)),
        inputs={"image": ("pixel_values", "pixel_attention_mask")},
        tower="grid",
        tower_grids=unhidden_tiles,
    ),
    Family(
        ("gemma3",), tiles(lambda config: config.mm_tokens_per_image), tower="grid", unit="image"
    ),
    Family(
        ("paligemma",), tiles(vit_tokens), first_place=1, one_mask=True, tower="grid", unit="image"
    ),
    Family(
        ("gemma4",),
        _gemma4_grids,
        rounded(_gemma4_cell),
        patches=lambda config: config.vision_config.pooling_kernel_size**2,
        inputs={
            "image": ("pixel_values", "image_position_ids"),
            "video": ("pixel_values_videos", "video_position_ids", "num_frames_per_video"),
        },
        tower="grid",
        tower_grids=_gemma4_patches,
    ),
    Family(
        ("mistral3",),
        image_sizes("image_sizes", _mistral_cell),
        fitted(_mistral_cell),
        {"image": ("pixel_values", "image_sizes", "vision_feature_layer")},
        patches=_mistral_patches,
        tower="grid",
        tower_grids=image_sizes("image_sizes", _patch_size),
    ),
    Family(
        ("lighton_ocr",),
        image_sizes("image_sizes", _mistral_cell),
        fitted(_mistral_cell),
        {"image": ("pixel_values", "image_sizes")},
        patches=_mistral_patches,
        tower="grid",
        tower_grids=image_sizes("image_sizes", _patch_size),
    ),
    Family(
        ("llava",),
        image_sizes("image_sizes", _patch_size),
        fitted(_patch_size),
        {"image": ("pixel_values", "image_sizes", *LAYER_CHOICE)},
        patches=lambda _: 1,
        tower="grid",
        tower_grids=image_sizes("image_sizes", _patch_size),
        of_tower="pixtral",
    ),
    Family(
        ("aya_vision",),
        tiles(lambda config: vit_tokens(config, config.downsample_factor)),
        inputs={"image": ("pixel_values", *LAYER_CHOICE)},
        tower="grid",
    ),
    Family(
        ("cohere2_vision",),
        tiles(lambda config: vit_tokens(config, config.downsample_factor)),
        tower="grid",
    ),
    Family(("deepseek_vl",), tiles(vit_tokens), tower="grid", unit="image"),
    Family(
        ("video_llama_3",),
        _own_merge_sizes,
        rounded(lambda config: config.vision_config.patch_size),
        patches=lambda _: 1,
        inputs={
            "image": ("pixel_values", "image_grid_thw", "image_merge_sizes"),
            "video": (
                *("pixel_values_videos", "video_grid_thw", "video_merge_sizes"),
                "video_compression_mask",
            ),
        },
        shown={"video": "video_compression_mask"},
    ),
    Family(
        ("kimi_k25",),
        _kimi_grids,
        padded(lambda c: c.vision_config.patch_size * c.vision_config.merge_kernel_size[0]),
        patches=lambda config: math.prod(config.vision_config.merge_kernel_size),
        inputs=PATCH_GRIDS,
        frames_per_grid=lambda config: config.vision_config.pos_emb_time,
    ),
    Family(
        ("molmo2",),
        _molmo_grids,
        lambda config, _: square(vit_tokens(config, 2)),
        patches=lambda _: 4,
        inputs={"image": ("pixel_values", "image_token_pooling", "image_grids")},
        several_grids=True,
    ),
    Family(
        ("lfm2_vl",),
        image_sizes("spatial_shapes", lambda config: config.downsample_factor),
        rounded(lambda config: config.vision_config.patch_size * config.downsample_factor),
        patches=lambda config: config.downsample_factor**2,
        inputs={"image": ("pixel_values", "spatial_shapes", "pixel_attention_mask")},
        tower="grid",
        tower_grids=image_sizes("spatial_shapes", lambda _: 1),
    ),
    Family(
        ("minicpmv4_6",),
        _minicpm_grids,
        rounded(lambda config: config.vision_config.patch_size * _minicpm_cell(config)),
        patches=lambda config: _minicpm_cell(config) ** 2,
        inputs={
            "image": ("pixel_values", "target_sizes", "downsample_mode"),
            "video": ("pixel_values_videos", "target_sizes_videos", "downsample_mode"),
        },
    ),
    Family(
        ("ovis2",),
        tiles(lambda config: vit_tokens(config, config.vision_config.hidden_stride)),
        tower="grid",
    ),
)
