"""Small models whose images have any size to serve: Qwen2-VL and its relatives.

Patches of 8 pixels, of which 2 x 2 become a token. Requests and the library's answers are those of
`served_tiled.py`.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from checkpoint_families import images, tokenizer, videos
from served_models import spread
from served_tiled import reference_tiled, save_images, tiled_requests
from tiny_family import END, IMAGE, START, VIDEO
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)

from pitome_vlm import MergeConfig

# Answers of the library, for releases of transformers on which it wraps no such model. From one
# with torchvision, by an algorithm that is not expected to change.
WRITTEN = Path(__file__).parent / "answers_of_grids.json"
CONFIGS = dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), MergeConfig(keep=0.25))
CONFIGS |= dict.fromkeys(("qwen3_vl", "qwen3_5"), MergeConfig(keep=0.25, algorithm="tome"))
# What every fourth request asks for.
BUDGETS = [None, {"keep": 1.0}, {"tokens": 5}, {"keep": 1 / 3}]
# What stands for an image in a prompt.
MARK = "<start><image><end>"
WORDS = 128
TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO}
TOKENS |= {"vision_start_token_id": START, "vision_end_token_id": END}
# The smallest image has four tokens, the largest 100.
LIMITS = {"shortest_edge": 32 * 32, "longest_edge": 160 * 160}
PATCHES = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2}


def save_grids(folder: Path, kind: str) -> str:
    """A random checkpoint; weights are large enough for answers to depend on everything."""
    torch.manual_seed(0)
    model = MODELS[kind]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, spread(name))
        model.lm_head.weight[[IMAGE, VIDEO, START, END]] = 0
    model.save_pretrained(folder)
    processor_of(kind).save_pretrained(folder)
    return str(folder)


def _text(**more):
    words = {"vocab_size": WORDS, "hidden_size": 128, "intermediate_size": 128}
    words |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    words |= {"max_position_embeddings": 4096, "pad_token_id": 0, "bos_token_id": 1}
    words |= {"eos_token_id": 2, "head_dim": 32}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
    return words | {"rope_parameters": rope} | more


VISION = {"depth": 5, "num_heads": 4, "patch_size": 8, "temporal_patch_size": 2}
VISION |= {"spatial_merge_size": 2}


def _qwen2_vl():
    vision = VISION | {"embed_dim": 64, "hidden_size": 128, "mlp_ratio": 2}
    config = Qwen2VLConfig(text_config=_text(), vision_config=vision, **TOKENS)
    return Qwen2VLForConditionalGeneration(config)


def _qwen2_5_vl():
    vision = VISION | {"hidden_size": 64, "out_hidden_size": 128, "intermediate_size": 128}
    # Windows of 2 x 2 tokens.
    vision |= {"window_size": 32, "fullatt_block_indexes": [1, 3]}
    config = Qwen2_5_VLConfig(text_config=_text(), vision_config=vision, **TOKENS)
    return Qwen2_5_VLForConditionalGeneration(config)


def _newer(**more):
    vision = VISION | {"hidden_size": 64, "out_hidden_size": 128, "intermediate_size": 128}
    return vision | {"num_position_embeddings": 36, "in_channels": 3} | more


def _interleaved(**more):
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_interleaved": True}
    return {"rope_parameters": rope | {"mrope_section": [6, 5, 5]} | more}


def _qwen3_vl():
    vision = _newer(deepstack_visual_indexes=[1, 3])
    words = _text(num_hidden_layers=3, **_interleaved())
    config = Qwen3VLConfig(text_config=words, vision_config=vision, **TOKENS)
    return Qwen3VLForConditionalGeneration(config)


def _qwen3_5():
    linear = {"linear_conv_kernel_dim": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32}
    linear |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    rope = _interleaved(partial_rotary_factor=0.25, mrope_section=[2, 1, 1])
    types = ["linear_attention", "full_attention"] * 2
    words = _text(num_hidden_layers=4, layer_types=types, **linear, **rope)
    config = Qwen3_5Config(text_config=words, vision_config=_newer(), **TOKENS)
    return Qwen3_5ForConditionalGeneration(config)


MODELS = {"qwen2_vl": _qwen2_vl, "qwen2_5_vl": _qwen2_5_vl}
MODELS |= {"qwen3_vl": _qwen3_vl, "qwen3_5": _qwen3_5}
PROCESSORS = {
    "qwen2_vl": (Qwen2VLProcessor, "Qwen2VL"),
    "qwen2_5_vl": (Qwen2_5_VLProcessor, "Qwen2VL"),
    "qwen3_vl": (Qwen3VLProcessor, "Qwen3VL"),
    "qwen3_5": (Qwen3VLProcessor, "Qwen3VL"),
}


def processor_of(kind: str):
    own, video = PROCESSORS[kind]
    words = tokenizer(image_token="<image>", video_token="<video>")
    photos = images("Qwen2VL", size=LIMITS, **PATCHES)
    return own(photos, words, videos(video, **PATCHES))


def grid_requests(paths: list[str]) -> list[dict]:
    """Twenty of zero, one and two images, with what the family puts around an image."""
    return [
        {
            **one,
            "prompt": one["prompt"].replace("<image>", MARK),
            "pitome": BUDGETS[number % 4],
        }
        for number, one in enumerate(tiled_requests(paths))
    ]


def write_answers() -> None:
    """Write down what the library answers, see `WRITTEN`."""
    with tempfile.TemporaryDirectory() as name:
        folder, kept = Path(name), {}
        requests = grid_requests(save_images(folder / "images"))
        for kind in json.loads(WRITTEN.read_text()):
            path = save_grids(folder / kind, kind)
            kept[kind] = reference_tiled(path, requests, CONFIGS[kind])
    WRITTEN.write_text(json.dumps(kept) + "\n")


if __name__ == "__main__":
    write_answers()
