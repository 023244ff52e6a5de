"""What a number needs to be judged and repeated: machine, model, software, settings.

Importing this does not import torch, so that commands can check folders before they load anything.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common import __version__

if TYPE_CHECKING:
    import torch

_SAMPLES = 64
# These differ between two loads of the same weights.
_NOT_THE_MODEL = ("_name_or_path", "transformers_version")
_CHECKPOINT_FILES = {".json", ".safetensors", ".bin", ".model", ".jinja"}
_END = 8 << 20


def provenance(model: Any = None, **facts: Any) -> dict[str, Any]:
    """Hardware, model, `facts` and versions, as plain JSON values.

    Args:
        model: what was measured, for its device, dtype, attention and quantization; None where
            no model is involved.
        **facts: whatever else decides the numbers: batch_size, seed, split, ...
    """
    found = machine(None if model is None else model.device)
    if model is not None:
        found |= {
            "dtype": str(model.dtype).removeprefix("torch."),
            "attention": str(model.config._attn_implementation),
            "quantization": quantization(model),
        }
    return {**found, **facts, **versions()}


def machine(device: torch.device | str | None = None) -> dict[str, Any]:
    """The processor or accelerator that `device` (default: the CPU) names, threads and cores."""
    import torch

    chosen = torch.device("cpu" if device is None else device)
    found: dict[str, Any] = {"hardware": processor_name(), "device": chosen.type}
    if chosen.type != "cpu":
        found["hardware"] = str(torch.get_device_module(chosen).get_device_name(chosen))
        if chosen.type == "cuda":
            found["cuda"] = torch.version.cuda
        found["cpu"] = processor_name()
    # Names of virtual machines say little; the instructions decide most, bfloat16 above all.
    found["instructions"] = torch.backends.cpu.get_cpu_capability()
    return {**found, "threads": torch.get_num_threads(), "cores": os.cpu_count()}


def versions(*packages: str) -> dict[str, str]:
    """Of Python, this package, torch, transformers, and further packages by distribution name."""
    return {
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "pitome_vlm": __version__,
        **{name: version(name) for name in packages},
    }


def in_words(facts: Mapping[str, Any]) -> str:
    """Facts as one line for the foot of a report: "hardware ..., threads 2, ..."."""
    return ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None)


@functools.cache
def processor_name() -> str:
    """The processor as the kernel calls it, else as Python does."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def quantization(model: Any) -> str:
    """The weights' quantization: "none", "4 bit", "8 bit", or the name of another method."""
    for bits in (4, 8):
        if getattr(model, f"is_loaded_in_{bits}bit", False):
            return f"{bits} bit"
    method = getattr(model, "quantization_method", None)
    return "none" if method is None else str(getattr(method, "value", method))


def model_fingerprint(model: Any) -> str:
    """A digest of a model's configuration and of samples of all its weights.

    Enough to tell two trainings, adapters or quantizations apart without reading gigabytes. Works
    on what is in memory, so that the same checkpoint loaded from two places is one model.
    """
    config = model.config.to_dict()
    kept = {key: value for key, value in config.items() if key not in _NOT_THE_MODEL}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode())
    for name, weight in model.named_parameters():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        # Weights that were offloaded have no values here.
        if weight.numel() and weight.device.type != "meta":
            flat = weight.detach().reshape(-1)
            picked = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES]
            digest.update(picked.double().cpu().numpy().tobytes())
    return f"sha256:{digest.hexdigest()[:16]}"


def checkpoint_fingerprint(checkpoint: str) -> str:
    """A digest of a checkpoint folder's content; the name itself for one on the hub.

    Configuration files are read whole, of weights the size and both ends: enough to tell two
    trainings apart without reading gigabytes or loading the model.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        return checkpoint
    digest = hashlib.sha256()
    files = (p for p in folder.rglob("*") if p.is_file() and p.suffix in _CHECKPOINT_FILES)
    for path in sorted(files):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_END))
            file.seek(max(0, size - _END))
            digest.update(file.read(_END))
    return f"sha256:{digest.hexdigest()}"
