"""Which model, on what hardware, with which software: what a number needs to be repeated.

Knows: how to tell two models in memory apart, and names of machines and packages. Does not know:
questions or settings.
"""

from __future__ import annotations

import hashlib
import json
import platform
from typing import Any

import torch
import transformers

from ...common import __version__
from ..machine import processor_name

_SAMPLES = 64
# Differ between two loads of the same weights.
_NOT_THE_MODEL = ("_name_or_path", "transformers_version")


def circumstances(model: Any) -> dict[str, Any]:
    """Name, fingerprint, hardware, number format and versions, as plain JSON values."""
    device = model.device
    return {
        "checkpoint": str(getattr(model.config, "_name_or_path", "")) or "in memory",
        "model": fingerprint(model),
        "hardware": _hardware(device),
        "device": device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantisation": _quantisation(model),
        "attention": str(model.config._attn_implementation),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "pitome_vlm": __version__,
    }


def fingerprint(model: Any) -> str:
    """A digest of a model's configuration and of samples of all its weights.

    Enough to tell two trainings, adapters or quantisations apart without reading gigabytes. Works
    on what is in memory, so that the same checkpoint loaded from two places is one model.
    """
    config = model.config.to_dict()
    plain = {key: value for key, value in config.items() if key not in _NOT_THE_MODEL}
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode())
    for name, weight in model.named_parameters():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        # Weights that were offloaded have no values here.
        if weight.numel() and weight.device.type != "meta":
            flat = weight.detach().reshape(-1)
            picked = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES]
            digest.update(picked.double().cpu().numpy().tobytes())
    return f"sha256:{digest.hexdigest()[:16]}"


def _quantisation(model: Any) -> str:
    for bits in (4, 8):
        if getattr(model, f"is_loaded_in_{bits}bit", False):
            return f"{bits} bit"
    method = getattr(model, "quantization_method", None)
    return "none" if method is None else str(getattr(method, "value", method))


def _hardware(device: torch.device) -> str:
    if device.type != "cpu":
        return str(torch.get_device_module(device).get_device_name(device))
    return processor_name()
