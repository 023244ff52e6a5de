"""Small checkpoints to serve, and what the library itself answers with them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

import pitome_vlm
from pitome_vlm import MergeConfig
from pitome_vlm.demo import scene_image
from pitome_vlm.demo.processor import BOS, EOS, IMAGE, PAD, build_processor, vocabulary
from pitome_vlm.wrapping.wrap import schedule_of

HERE = Path(__file__).resolve().parent
ANSWER_TOKENS = 16
RANK = 4
SCENES = 45
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # Tests run side by side, and vLLM would bind all of their engines to the same core.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


# What a weight is called, by the beginning of its name in published checkpoints less the level
# `vision_model`, which every writer but transformers 5 puts into the tower's names.
PARTS = (
    "language_model.model.",
    "language_model.lm_head.",
    "vision_tower.",
    "multi_modal_projector.",
)
NAMINGS = {
    "published": (*PARTS[:2], "vision_tower.vision_model.", PARTS[3]),
    "saved by transformers 5": PARTS,
    "modules of transformers 5": (
        "model.language_model.",
        "lm_head.",
        "model.vision_tower.",
        "model.multi_modal_projector.",
    ),
}


def environment(**more: str) -> dict[str, str]:
    """Of a process with vLLM in it; this checkout is the one that is tested."""
    return {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(HERE.parents[2]), **more}


def save_tiny(folder: Path, kind: str, *, qwen: bool = False) -> str:
    """A random LLaVA of 12 x 12 patches with the demo's words; vLLM needs heads of 32.

    Two heads of queries share one of keys. The language model is Llama's, or Qwen2's.
    """
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6}
    size |= {"num_attention_heads": 4, "image_size": 96, "patch_size": 8}
    vision = SiglipVisionConfig(**size) if kind == "siglip" else CLIPVisionConfig(**size)
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    yarn["original_max_position_embeddings"] = 256
    text = (Qwen2Config if qwen else LlamaConfig)(
        vocab_size=len(vocabulary()),
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        **({"rope_parameters": yarn} if qwen else {}),
    )
    strategy = "full" if kind == "siglip" else "default"
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_select_strategy=strategy,
        image_seq_length=144,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, spread(name))
    model.save_pretrained(folder)
    processor = build_processor()
    processor.image_processor.size = {"height": 96, "width": 96}
    processor.patch_size = 8
    processor.num_additional_image_tokens = 0 if kind == "siglip" else 1
    processor.vision_feature_select_strategy = strategy
    processor.save_pretrained(folder)
    return str(folder)


def save_under_names(path: str, folder: Path, naming: str) -> str:
    """A copy of a checkpoint whose weights are called as in one of `NAMINGS`."""
    shutil.copytree(path, folder, dirs_exist_ok=True)
    weights = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        (part,) = (number for number, start in enumerate(PARTS) if name.startswith(start))
        rest = name.removeprefix(PARTS[part]).removeprefix("vision_model.")
        weights[NAMINGS[naming][part] + rest] = weight
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def spread(name: str) -> float:
    """Standard deviations with which answers depend on words, pixels and merging."""
    if "embed_tokens" in name or "lm_head" in name:
        return 1.0
    return 0.2 if "language_model" in name else 0.15


def save_adapter(path: str, folder: Path) -> str:
    """A random LoRA adapter of the language model of a checkpoint, as PEFT saves it."""
    model = AutoModelForImageTextToText.from_pretrained(path)
    generator, weights = torch.Generator().manual_seed(0), {}
    for name, parameter in model.named_parameters():
        if "language_model" in name and name.endswith(("q_proj.weight", "v_proj.weight")):
            name = f"base_model.model.{name.removesuffix('.weight')}"
            for part, shape in (
                ("lora_A", (RANK, parameter.shape[1])),
                ("lora_B", (parameter.shape[0], RANK)),
            ):
                weights[f"{name}.{part}.weight"] = torch.randn(shape, generator=generator) / 4
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "bias": "none"}
    config["target_modules"] = ["q_proj", "v_proj"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


def add_adapter(model, folder: str) -> None:
    """Add a `save_adapter` adapter to the weights of the library's model."""
    weights = load_file(Path(folder) / "adapter_model.safetensors")
    with torch.no_grad():
        for name, down in weights.items():
            if "lora_A" in name:
                up = weights[name.replace("lora_A", "lora_B")]
                target = name.removeprefix("base_model.model.").replace(".lora_A", "")
                model.get_parameter(target).add_(up @ down)


def reference(
    path,
    requests,
    config: MergeConfig | None,
    *,
    adapter: str | None = None,
    tokens: int = ANSWER_TOKENS,
):
    """The library's own greedy answers: [(prompt tokens, answer)].

    A request's own budget is in `pitome`.
    """
    model = LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(path)
    if adapter is not None:
        add_adapter(model, adapter)
    saved, found = 0, []
    for request in requests:
        if config is not None:
            pitome_vlm.wrap(model, config=config.replace(**request.get("pitome", {})))
            schedule = schedule_of(model)
            saved = schedule.tokens_in - schedule.tokens_out
        images = [Image.open(name).convert("RGB") for name in request["images"]]
        batch = processor(images=images or None, text=request["prompt"], return_tensors="pt")
        length = batch["input_ids"].shape[1]
        output = model.generate(
            **batch,
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
        )
        found.append((length - saved * len(images), output[0, length:].tolist()))
    return found


def pixels_of(path):
    """[3 + SCENES, 3, H, W]: noise, and drawn scenes, whose equal patches make near ties."""
    side = AutoConfig.from_pretrained(path).vision_config.image_size
    noise = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0))
    scenes = [scene_image(number, "val") for number in range(SCENES)]
    processor = AutoProcessor.from_pretrained(path).image_processor
    return torch.cat([noise, processor(scenes, return_tensors="pt")["pixel_values"]])


class Library:
    """The library's own visual tokens."""

    def __init__(self, path):
        loaded = LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
        self.model = loaded.eval()

    def features(self, options, pixels):
        """[B, n, C] under some merge options."""
        pitome_vlm.wrap(self.model, config=MergeConfig.from_dict(options))
        with torch.no_grad():
            return torch.stack(pitome_vlm.encode_images(self.model, pixels).features)

    def last_bit_decides(self, options, pixels, found, tolerance):
        """Whether the library itself finds [n, C] when the last bits of [3, H, W] change.

        A tie within rounding then, at which neither choice is the right one.
        """
        generator = torch.Generator().manual_seed(0)
        for draw in range(16):
            noise = torch.randn(32, *pixels.shape, generator=generator)
            # Pixel values go up to about two, where the last bit is worth 2e-7.
            other = self.features(options, pixels + (1e-7, 1e-6)[draw % 2] * noise)
            if ((other - found).abs().amax((1, 2)) < tolerance).any():
                return True
        return False
