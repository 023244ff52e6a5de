"""Models of published shapes with random weights, so that timing needs no download."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

from ...common import suggest, whole_number

_MODELS = {
    "llava": LlavaForConditionalGeneration,
    "llava_next": LlavaNextForConditionalGeneration,
    "llava_onevision": LlavaOnevisionForConditionalGeneration,
    "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
}


def _clip(**changes: Any) -> CLIPVisionConfig:
    """openai/clip-vit-large-patch14-336."""
    known = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
    }
    return CLIPVisionConfig(**(known | changes))


def _siglip(**changes: Any) -> SiglipVisionConfig:
    """google/siglip-so400m-patch14-384 as OneVision uses it: 26 of 27 layers, no pooling head."""
    known = {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 26,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
        "vision_use_head": False,
    }
    return SiglipVisionConfig(**(known | changes))


def _llama(width: int, inner: int, layers: int, heads: int, words: int = 32064) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )


_QWEN2 = {
    "vocab_size": 152000,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
}


def _qwen2(**changes: Any) -> Qwen2Config:
    """Qwen/Qwen2-7B-Instruct."""
    return Qwen2Config(**(_QWEN2 | changes))


def _qwen2_5_vl(
    vision: dict[str, Any], text: dict[str, Any], sections: list[int]
) -> Qwen2_5_VLConfig:
    """Of its last three ids the one that opens an image, and the placeholders."""
    text = _QWEN2 | text
    first = int(text["vocab_size"]) - 3
    names = ("vision_start_token_id", "image_token_id", "video_token_id")
    return Qwen2_5_VLConfig(
        vision_config=vision | {"out_hidden_size": text["hidden_size"]},
        text_config=text | {"rope_scaling": {"rope_type": "default", "mrope_section": sections}},
        tie_word_embeddings=False,
        **{name: first + number for number, name in enumerate(names)},
    )


def _pinpoints(side: int, next_only: bool) -> list[list[int]]:
    """Grids of tiles: LLaVA-1.6 has five, OneVision all of 1 to 6 by 1 to 6 tiles."""
    if next_only:
        return [[side * h, side * w] for h, w in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
    return [[side * h, side * w] for h, w in itertools.product(range(1, 7), repeat=2)]


def _llava(vision: Any, text: Any) -> LlavaConfig:
    return LlavaConfig(vision_config=vision, text_config=text, image_token_index=_image(text))


def _next(vision: Any, text: Any) -> LlavaNextConfig:
    return LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=_image(text),
        image_grid_pinpoints=_pinpoints(vision.image_size, next_only=True),
    )


def _onevision(vision: Any, text: Any, image: int, video: int) -> LlavaOnevisionConfig:
    return LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image,
        video_token_index=video,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        vision_aspect_ratio="anyres_max_9",
        image_grid_pinpoints=_pinpoints(vision.image_size, next_only=False),
    )


def _image(text: Any) -> int:
    """Id of the image placeholder: 32000 as in the checkpoints, the last id of tiny shapes."""
    return 32000 if text.vocab_size > 32000 else int(text.vocab_size) - 1


_SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
_SMALL_TOWER = _SMALL | {"num_hidden_layers": 6, "image_size": 96, "patch_size": 8}
_SMALL_QWEN = _SMALL | {"num_hidden_layers": 2, "num_key_value_heads": 2, "vocab_size": 128}
_QWEN_TOWER = {"hidden_size": 1280, "num_heads": 16, "depth": 32, "patch_size": 14}
_SMALL_QWEN_TOWER: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_heads": 4}
_SMALL_QWEN_TOWER |= {"depth": 3, "patch_size": 14, "window_size": 56}
_SMALL_QWEN_TOWER |= {"fullatt_block_indexes": [2]}
# Shapes by name: llava-hf/llava-1.5-7b-hf, llava-1.5-13b-hf, llava-v1.6-vicuna-7b-hf,
# llava-onevision-qwen2-7b-ov-hf and Qwen/Qwen2.5-VL-7B-Instruct; the tiny ones are for trying
# things out.
SHAPES: dict[str, Callable[[], Any]] = {
    "llava-1.5-7b": lambda: _llava(_clip(), _llama(4096, 11008, 32, 32)),
    "llava-1.5-13b": lambda: _llava(_clip(), _llama(5120, 13824, 40, 40)),
    "llava-next-7b": lambda: _next(_clip(), _llama(4096, 11008, 32, 32)),
    "onevision-7b": lambda: _onevision(_siglip(), _qwen2(), 151646, 151647),
    "qwen2.5-vl-7b": lambda: _qwen2_5_vl(_QWEN_TOWER, {"vocab_size": 152064}, [16, 24, 24]),
    "tiny": lambda: _llava(_clip(**_SMALL_TOWER), _llama(32, 64, 2, 4, 128)),
    "tiny-next": lambda: _next(_clip(**_SMALL_TOWER), _llama(32, 64, 2, 4, 128)),
    "tiny-onevision": lambda: _onevision(_siglip(**_SMALL_TOWER), _qwen2(**_SMALL_QWEN), 126, 127),
    "tiny-qwen2.5-vl": lambda: _qwen2_5_vl(_SMALL_QWEN_TOWER, _SMALL_QWEN, [1, 1, 2]),
}


def configuration(name: str, *, layers: int | None = None) -> Any:
    """The configuration of a published shape (`SHAPES`), of all or of some layers.

    Raises:
        ValueError: unknown name, or more layers than the shape has.
    """
    if name not in SHAPES:
        raise ValueError(
            f"unknown shape {name!r}.{suggest(name, list(SHAPES))} Available: {', '.join(SHAPES)}"
        )
    config = SHAPES[name]()
    if layers is not None:
        text = config.text_config
        text.num_hidden_layers = whole_number("layers", layers, 1, text.num_hidden_layers)
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
    return config


def build(
    name: str,
    *,
    layers: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
    attention: str = "sdpa",
) -> Any:
    """A model of a published shape with random weights, in eval mode.

    Args:
        name: one of `SHAPES`.
        layers: build only so many layers of the language model; None for all.
        dtype: dtype of the weights.
        device: device of the weights; "meta" allocates none.
        seed: random seed of the weights.
        attention: the model's `attn_implementation`.

    Raises:
        ValueError: unknown name, or more layers than the shape has.
        MemoryError: the device's free memory does not hold the weights.
    """
    config, device = configuration(name, layers=layers), torch.device(device)
    needed, free = needed_bytes(name, layers=layers, dtype=dtype), free_bytes(device)
    if free is not None and needed > free:
        raise MemoryError(
            f"{name} in {dtype} takes {needed / 2**30:.1f} GiB and {device} has "
            f"{free / 2**30:.1f} GiB free; use fewer layers (--layers 4) or --dtype bfloat16"
        )
    model = _made(config, dtype, device, seed, attention)
    # A random model would end answers at random; every answer has to be as long as asked for.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    if device.type != "meta":
        # Never answer with a placeholder, which the next step would need an image for.
        known = (getattr(config, f"{kind}_token_id", None) for kind in ("image", "video"))
        with torch.no_grad():
            model.lm_head.weight[[token for token in known if token is not None]] = 0
    return model


def needed_bytes(
    name: str, *, layers: int | None = None, dtype: torch.dtype = torch.float32
) -> int:
    """Bytes of the weights of a shape; nothing is allocated."""
    model = _made(configuration(name, layers=layers), dtype, torch.device("meta"), 0, "sdpa")
    return int(sum(parameter.numel() * dtype.itemsize for parameter in model.parameters()))


def _made(config: Any, dtype: torch.dtype, device: torch.device, seed: int, attention: str) -> Any:
    # The caller's random state must not change.
    accelerators = [device] if device.type not in ("cpu", "meta") else []
    kind = device.type if accelerators else "cuda"
    with torch.random.fork_rng(accelerators, device_type=kind), torch.device(device):
        torch.manual_seed(seed)
        model = _MODELS[config.model_type]._from_config(
            config, dtype=dtype, attn_implementation=attention
        )
    return model.eval()


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a device in bytes, None where that is not known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    try:
        with open("/proc/meminfo", encoding="utf-8") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        try:
            return int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        except (ValueError, OSError):
            return None
