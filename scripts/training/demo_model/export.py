"""Writing the checkpoint folder that ships with the package.

Knows the file format (bf16 safetensors, tokenizer, processor) and how to replace the shipped
folder in one move. Leaves training to `tower.py` and `language.py`.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from pitome_vlm.demo.processor import build_processor

LIMIT_BYTES = 12 * 1024 * 1024


def export(model: LlavaForConditionalGeneration, target: Path, card: str) -> None:
    """Write `model` in bf16 with processor and card next to `target`, then move it there."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    half = copy.deepcopy(model).to(torch.bfloat16)
    half.save_pretrained(partial, safe_serialization=True)
    processor = build_processor()
    processor.save_pretrained(partial)
    _for_older_releases(partial)
    (partial / "README.md").write_text(card)
    size = sum(f.stat().st_size for f in partial.rglob("*"))
    if size > LIMIT_BYTES:
        raise ValueError(f"checkpoint size must be at most {LIMIT_BYTES} bytes, got {size}")
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    for file in partial.iterdir():
        file.chmod(0o644)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _for_older_releases(folder: Path) -> None:
    """Release 4.57 reads the image processor from its own file and knows other class names."""
    processor: dict[str, Any] = json.loads((folder / "processor_config.json").read_text())
    image = processor["image_processor"]
    image["image_processor_type"] = "CLIPImageProcessor"
    (folder / "processor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    flat = {**image, "processor_class": "LlavaProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(flat, indent=2) + "\n")
    path = folder / "tokenizer_config.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    # 4.57 reads a list of further special tokens under its old name only.
    tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens")
    path.write_text(json.dumps(tokenizer, indent=2) + "\n")
    weights = folder / "model.safetensors"
    tensors = {_old_name(name): tensor for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})


def _old_name(name: str) -> str:
    """Vision towers lost a level in release 5, which still reads the names with it."""
    for prefix in ("vision_tower.", "model.vision_tower."):
        if name.startswith(prefix) and not name.startswith(f"{prefix}vision_model."):
            return f"{prefix}vision_model.{name.removeprefix(prefix)}"
    return name


def load_state(model: LlavaForConditionalGeneration, state: dict[str, Tensor]) -> None:
    missing, unexpected = model.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise ValueError(f"weights do not fit: missing {missing}, unexpected {unexpected}")
