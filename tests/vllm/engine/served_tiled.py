"""Small models of several tiles per image to serve, and what the library itself answers with them.

Tiles of 8 x 8 patches. LLaVA-NeXT has CLIP and Llama, LLaVA-OneVision has SigLIP and Qwen2.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import torch
from over_http import image_url
from PIL import Image
from served_models import ANSWER_TOKENS, add_adapter, spread
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    Qwen2Config,
    SiglipVisionConfig,
)

import pitome_vlm
from pitome_vlm.demo import scene_image
from pitome_vlm.demo.processor import BOS, EOS, IMAGE, PAD, build_processor, vocabulary
from pitome_vlm.wrapping.encode import prompt_images
from scripts.serving.memory import broken_urls

TILE, PATCH = 64, 8
PINS = [[64, 128], [128, 64], [128, 128], [64, 192], [192, 64]]
VIDEO = len(vocabulary())
# (width, height): overview and two to four tiles, padding on all sides, resampled in OneVision.
SIZES = [(180, 100), (60, 150), (90, 90), (128, 128), (200, 60), (64, 190), (127, 129), (300, 40)]
WORDS = ["how many stars are there?", "what colour is the circle?", "what is this", "which shape?"]


# Options of an engine in which two processes have half of the heads each.
PARALLEL = {"tensor_parallel_size": 2, "env": {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}}
# Options of a request, with what is said: the engine's process would die of them.
SMALL = {"height": 32, "width": 32}
SQUARES = [("size", SMALL, "must become 64 x 64 pixels")]
PINS_OF_ONE = [[64, 64]]
DEADLY = {
    "internvl": [("size", SMALL, "mm_processor_kwargs: ")],
    "llava_next": [
        ("crop_size", SMALL, "must become 64 x 64 pixels"),
        ("images_kwargs", {"image_grid_pinpoints": PINS_OF_ONE}, "pinpoints must be"),
    ],
    "llava_onevision": [*SQUARES, ("image_grid_pinpoints", PINS_OF_ONE, "pinpoints must be")],
    "grid": [
        ("patch_size", 3, "patch_size must be 8"),
        ("images_kwargs", {"merge_size": 1}, "merge_size must be 2"),
        ("input_data_format", "channels_last", "cannot be set"),
    ],
}
# Of some models vLLM itself names the second one.
FOR_ALL = [("return_tensors", "np", "cannot be set"), ("device", "meta", "device")]
# What is said to images that cannot be read.
BROKEN = {
    "bad base64": "base64",
    "text as image": "cannot identify image file",
    "empty": "cannot identify image file",
    "cut off": "truncated",
    "damaged": "cannot identify image file",
    "damaged later": "broken PNG file",
    "oversized": "exceed",
    "decompression bomb": "decompression bomb",
    "a file of the server": "local files",
    "no address": "URL must be",
}


def save_tiled(folder: Path, model_type: str) -> str:
    """A random checkpoint; weights are large enough for answers to depend on everything."""
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 5}
    size |= {"num_attention_heads": 4, "image_size": TILE, "patch_size": PATCH}
    words = {"vocab_size": VIDEO + 1, "hidden_size": 128, "intermediate_size": 128}
    words |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    words |= {"max_position_embeddings": 4096, "pad_token_id": PAD}
    words |= {"bos_token_id": BOS, "eos_token_id": EOS}
    shared = {"image_token_index": IMAGE, "image_grid_pinpoints": PINS}
    if model_type == "llava_next":
        config = LlavaNextConfig(
            vision_config=CLIPVisionConfig(**size, projection_dim=16),
            text_config=LlamaConfig(**words),
            vision_feature_select_strategy="default",
            **shared,
        )
        model = LlavaNextForConditionalGeneration(config)
    else:
        config = LlavaOnevisionConfig(
            vision_config=SiglipVisionConfig(**size),
            text_config=Qwen2Config(**words),
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
            video_token_index=VIDEO,
            **shared,
        )
        model = LlavaOnevisionForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or name.endswith("image_newline"):
                parameter.normal_(0, spread(name))
        model.lm_head.weight[[IMAGE, VIDEO]] = 0
    model.save_pretrained(folder)
    processor_of(model_type).save_pretrained(folder)
    return str(folder)


def processor_of(model_type: str):
    tokenizer = build_processor().tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<video>"]})
    assert tokenizer.convert_tokens_to_ids("<video>") == VIDEO
    if model_type == "llava_next":
        images = LlavaNextImageProcessor(
            size={"shortest_edge": TILE},
            crop_size={"height": TILE, "width": TILE},
            image_grid_pinpoints=PINS,
        )
        return LlavaNextProcessor(
            image_processor=images,
            tokenizer=tokenizer,
            patch_size=PATCH,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            image_token="<image>",
        )
    square = {"height": TILE, "width": TILE}
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=square, image_grid_pinpoints=PINS),
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(size=square),
        num_image_tokens=(TILE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        image_token="<image>",
        video_token="<video>",
    )


def save_images(folder: Path) -> list[str]:
    """Scenes with noise, because equal patches make ties."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, (width, height) in enumerate(SIZES):
        scene = np.asarray(scene_image(number, "val").resize((width, height)), dtype=np.int16)
        noise = np.random.default_rng(number).integers(-40, 40, scene.shape)
        path = folder / f"{number}.png"
        Image.fromarray((scene + noise).clip(0, 255).astype(np.uint8)).save(path)
        paths.append(str(path))
    return paths


def tiled_requests(paths: list[str]) -> list[dict]:
    """Twenty: every image alone, pairs of all shapes, an image again with another question."""
    n = len(paths)
    shown = [[path] for path in paths]
    shown += [[paths[one % n], paths[(one * 3 + 1) % n]] for one in range(8)]
    shown += [[paths[0]], [paths[3]], [paths[5], paths[1]], []]
    found = []
    for number, images in enumerate(shown):
        words = WORDS[(number + number // n) % len(WORDS)]
        places = " ".join(f"user: <image> {WORDS[number % 3]}" for _ in images[1:])
        place = "<image> " if images else ""
        prompt = f"{places} user: {place}{words} assistant:".strip()
        found.append({"prompt": prompt, "images": images})
    return found


def video_requests(paths: list[str]) -> list[dict]:
    """Videos of two lengths, one next to an image."""
    return [
        {"prompt": "user: <video> what is this assistant:", "images": [], "frames": paths[:4]},
        {"prompt": "user: <video> how many ? assistant:", "images": [], "frames": paths[2:5]},
        {
            "prompt": "user: <image> what ? user: <video> which shape? assistant:",
            "images": paths[:1],
            "frames": paths[3:7],
        },
    ]


def frames_of(paths: list[str]) -> np.ndarray:
    """[frames, height, width, 3] uint8."""
    return np.stack(
        [np.asarray(Image.open(path).convert("RGB").resize((80, 60))) for path in paths]
    )


def video_request(paths: list[str]) -> tuple[dict, str]:
    """A video of four frames, two of which are to be dropped, and what is said to it."""
    frames = []
    for frame in frames_of(paths[:4]):
        held = io.BytesIO()
        Image.fromarray(frame).save(held, "jpeg")
        frames.append(base64.b64encode(held.getvalue()).decode())
    video = f"data:video/jpeg;base64,{','.join(frames)}"
    dropped = {"videos_kwargs": {"do_sample_frames": True, "num_frames": 2}}
    request = {"prompt": "what is this", "videos": [video], "processor": dropped}
    return request, "keep its 4 frames, got 2; leave out do_sample_frames, num_frames"


def refused_requests(paths: list[str], kind: str) -> list[tuple[dict, str | None]]:
    """Requests that no server can answer, with what is said to them; None where one is answered.

    Args:
        paths: of images.
        kind: of the model.
    """
    asked, other = ({"prompt": "what is this", "images": [path]} for path in paths[:2])
    options = DEADLY.get(kind, SQUARES) + FOR_ALL
    videos = [video_request(paths)] if kind == "llava_onevision" else []
    return [
        *videos,
        ({**asked, "pitome": {"keep": 2}}, "keep must be in (0, 1]"),
        ({**asked, "pitome": {"tokens": 0}}, "tokens must be"),
        ({**asked, "pitome": {"algorithm": "pool"}}, "algorithm must be this server's"),
        ({**asked, "pitome": 0.5}, "must be an object"),
        ({**asked, "images": paths[:3]}, "At most 2"),
        *(({**asked, "processor": {name: value}}, said) for name, value, said in options),
        *(
            ({"prompt": "what is this", "urls": [broken]}, BROKEN[name])
            for name, broken in broken_urls(image_url(paths[0])).items()
        ),
        ({**asked, "videos": ["data:video/mp4;base64,AAAA"]}, "video"),
        ({**asked, "own": {"truncate_prompt_tokens": 3}}, "must hold a place"),
        # Its image is known to the server then, and not to the engine.
        ({**other, "prompt": "star " * 1500}, "context length"),
        (other, None),
    ]


def reference_tiled(
    path, requests, config, *, tokens: int = ANSWER_TOKENS, unseen=(), noise=None, adapter=None
):
    """The library's own greedy answers: [(prompt tokens, answer)].

    A request's own budget is in `pitome`; `config` None is the model without merging. `unseen` are
    arguments of the processor that the model does not get. `noise` is a generator of changes of the
    last bits of pixels. `adapter` is a folder of `save_adapter`.
    """
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    if adapter:
        add_adapter(model, adapter)
    processor = AutoProcessor.from_pretrained(path)
    found = []
    for request in requests:
        own = config
        if config is not None:
            own = config.replace(adapt="pixels", **request.get("pitome") or {})
            pitome_vlm.wrap(model, config=own)
        images = [Image.open(name).convert("RGB") for name in request["images"]]
        videos = {"videos": [frames_of(request["frames"])]} if request.get("frames") else {}
        batch = processor(
            images=images or None, text=request["prompt"], return_tensors="pt", **videos
        )
        batch = {name: value for name, value in batch.items() if name not in unseen}
        if noise is not None:
            for name in [name for name in batch if name.startswith("pixel_values")]:
                pixels = batch[name]
                batch[name] = pixels + 1e-6 * torch.randn(pixels.shape, generator=noise)
        saved = sum(one.full - one.count for one in prompt_images(model, batch)) if own else 0
        length = batch["input_ids"].shape[1]
        output = model.generate(
            **batch, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens
        )
        found.append((length - saved, output[0, length:].tolist()))
    return found
