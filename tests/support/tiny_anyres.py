"""Tiny models that cut images into tiles, and batches in the format of their processors."""

from __future__ import annotations

import torch
from tiny import IMAGE, _spread
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

SIDE, TILE = 8, 64
PINS = [[64, 128], [128, 64], [128, 128], [64, 192], [192, 64]]
VIDEO = 98
ANYRES_KINDS = ("next", "next_list", "next_siglip", "onevision", "onevision_resampled")
# Height, width: extreme, one pixel wide, smaller than a patch, exact tiles, ordinary.
SIZES = (
    *[(1, 1), (1, 50), (50, 1), (1, 500), (500, 1), (3, 3), (5, 4), (7, 200), (200, 7)],
    *[(10, 3000), (3000, 10), (90, 90), (64, 64), (63, 65), (128, 128), (127, 129), (192, 64)],
    *[(64, 192), (100, 180), (150, 60), (333, 100), (64, 640), (1000, 1000), (1234, 567)],
)


def anyres_model(kind: str = "next", *, seed: int = 0, layers: int = 6, attention: str = "sdpa"):
    """A model with tiles of 8 x 8 patches. Weights are large enough for outputs to differ."""
    torch.manual_seed(seed)
    size = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "image_size": TILE,
        "patch_size": TILE // SIDE,
    }
    words = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    clip = kind in ("next", "next_list")
    vision = CLIPVisionConfig(**size, projection_dim=16) if clip else SiglipVisionConfig(**size)
    options = {
        "vision_config": vision,
        "text_config": LlamaConfig(**words) if clip else Qwen2Config(**words),
        "image_token_index": IMAGE,
        "image_grid_pinpoints": PINS,
        "vision_feature_select_strategy": "default" if clip else "full",
    }
    if kind.startswith("onevision"):
        most = 1 if kind == "onevision_resampled" else 9
        options |= {"video_token_index": VIDEO, "vision_aspect_ratio": f"anyres_max_{most}"}
        options["vision_feature_layer"] = -1
        config = LlavaOnevisionConfig(**options)
        model_class = LlavaOnevisionForConditionalGeneration
    else:
        if kind == "next_list":
            options["vision_feature_layer"] = [-2, 3]
        config, model_class = LlavaNextConfig(**options), LlavaNextForConditionalGeneration
    config.pad_token_id = 0
    config._attn_implementation = attention
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or name.endswith("image_newline"):
                parameter.normal_(0, _spread(name))
        # Answers are words: a placeholder of the model's own making would wait for an image.
        model.lm_head.weight[[IMAGE, VIDEO]] = 0
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def tile_counts(model, sizes, alone=None):
    """Tiles of every image, by the model's own function."""
    module = __import__(type(model).__module__, fromlist=["image_size_to_num_patches"])
    alone = [True] * len(sizes) if alone is None else alone
    return [
        module.image_size_to_num_patches(list(size), PINS, TILE) if own else 1
        for size, own in zip(sizes, alone, strict=True)
    ]


def anyres_pixels(model, sizes, *, seed: int = 1, alone=None, flat: bool = False):
    """`pixel_values` and `image_sizes` as the processor makes them, batches padded with zeros."""
    generator = torch.Generator().manual_seed(seed)
    counts = tile_counts(model, sizes, alone)
    tiles = [torch.randn(count, 3, TILE, TILE, generator=generator) for count in counts]
    pixels = torch.cat(tiles)
    if not flat:
        pixels = torch.zeros(len(sizes), max(counts), 3, TILE, TILE)
        for own, one in zip(pixels, tiles, strict=True):
            own[: len(one)] = one
    return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


@torch.no_grad()
def unmerged(model, vision):
    """[L, C] of every image, as the model itself makes them without merging."""
    out = model.model.get_image_features(**vision)
    return list(getattr(out, "pooler_output", out))


def anyres_batch(
    model, rows=(((100, 180),), ((150, 60), (90, 90))), texts=(5, 9), *, side="left", seed: int = 1
):
    """Row i shows images of the sizes `rows[i]`, each after three words, and `texts[i]` words."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [size for row in rows for size in row]
    vision = anyres_pixels(model, sizes, seed=seed)
    lengths = iter([len(one) for one in unmerged(model, vision)])

    def words(n):
        return torch.randint(3, 90, (n,), generator=generator).tolist()

    found = []
    for row, text in zip(rows, texts, strict=True):
        line = [1]
        for _ in row:
            line += words(3) + [IMAGE] * next(lengths)
        found.append(line + words(text))
    width = max(map(len, found))
    ids = torch.zeros(len(found), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, line in enumerate(found):
        place = slice(width - len(line), None) if side == "left" else slice(len(line))
        ids[i, place], mask[i, place] = torch.tensor(line), 1
    return {"input_ids": ids, "attention_mask": mask, **vision}
