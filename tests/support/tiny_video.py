"""Tiny models that take videos, and batches in the format of their processors."""

from __future__ import annotations

import torch
from tiny import IMAGE, _spread
from tiny_anyres import PINS, SIDE, TILE, VIDEO, anyres_model
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)

VIDEO_KINDS = ("onevision", "next_video", "next_video_max", "next_video_conv", "video_llava")


def video_model(kind: str = "onevision", *, seed: int = 0, layers: int = 5):
    """Frames of 8 x 8 patches. Weights are large enough for outputs to differ by input."""
    if kind == "onevision":
        return anyres_model("onevision", seed=seed, layers=layers)
    torch.manual_seed(seed)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers}
    size |= {"num_attention_heads": 4, "image_size": TILE, "patch_size": TILE // SIDE}
    words = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "pad_token_id": 0}
    words |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    words |= {"max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 2}
    options = {"vision_config": CLIPVisionConfig(**size, projection_dim=16)}
    options |= {"text_config": LlamaConfig(**words)}
    options |= {"image_token_index": IMAGE, "video_token_index": VIDEO}
    options |= {"vision_feature_select_strategy": "default"}
    if kind == "video_llava":
        model_class, config = VideoLlavaForConditionalGeneration, VideoLlavaConfig(**options)
    else:
        mode = {"next_video_max": "max", "next_video_conv": "conv"}.get(kind, "average")
        options |= {"image_grid_pinpoints": PINS, "spatial_pool_mode": mode}
        config = LlavaNextVideoConfig(**options, spatial_pool_stride=2)
        model_class = LlavaNextVideoForConditionalGeneration
    config.pad_token_id = 0
    config._attn_implementation = "sdpa"
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or name.endswith("image_newline"):
                parameter.normal_(0, _spread(name))
        model.lm_head.weight[[IMAGE, VIDEO]] = 0
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def video_pixels(videos: int = 1, frames: int = 4, *, seed: int = 1):
    """[videos, frames, 3, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(videos, frames, 3, TILE, TILE, generator=generator)


@torch.no_grad()
def unmerged_videos(model, pixels):
    """[L, C] of every video, as the model itself makes them without merging."""
    layer = {"vision_feature_layer": model.config.vision_feature_layer}
    if hasattr(model.config, "vision_feature_select_strategy") and not hasattr(
        model.model, "video_tower"
    ):
        layer["vision_feature_select_strategy"] = model.config.vision_feature_select_strategy
    out = model.model.get_video_features(pixels, **layer)
    out = getattr(out, "pooler_output", out)
    if isinstance(out, tuple):
        # Before release 5: (frames, number of frames), or the frames of every video.
        out = out[0] if isinstance(out[1:] and out[1], int) else torch.cat(out)
    found = list(out.reshape(len(pixels), -1, out.shape[-1]))
    newline = getattr(model.model, "image_newline", None)
    if hasattr(model.model, "apply_pooling") and not torch.equal(found[0][-1], newline):
        # Release 4.57 adds the newline later.
        found = [torch.cat([one, newline[None]]) for one in found]
    return found


def video_batch(model, pixels, *, texts=None, image=None, side="left", seed: int = 1):
    """One video per row, after three words and before the closing ones.

    `image` puts an image of that size before the first row's video.
    """
    generator = torch.Generator().manual_seed(seed)
    full = len(unmerged_videos(model, pixels[:1])[0])
    texts = texts or [4 + 3 * row for row in range(len(pixels))]

    def words(n):
        return torch.randint(3, 90, (n,), generator=generator).tolist()

    rows = [[1, *words(3), *[VIDEO] * full, *words(text)] for text in texts]
    vision = {"pixel_values_videos": pixels}
    if image is not None:
        shown, count = image
        vision |= shown
        rows[0][2:2] = [IMAGE] * count
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(width - len(row), None) if side == "left" else slice(len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask, **vision}
