"""4-bit and 8-bit loading through bitsandbytes, of the language model only.

Knows: what to quantise and how to see that it happened. Does not know: checkpoints or merging.
Vision tower and projector stay as they are: they are a few percent of the weights, and tokens
are compared by what the tower computes.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

# Releases read these patterns differently (substring of the path, or anchored at its start), so
# both spellings are given and the result is checked.
UNQUANTISED = ("vision_tower", "multi_modal_projector")
SKIPPED = ("lm_head", *UNQUANTISED, *(f"model.{name}" for name in UNQUANTISED))
QUANTISED_CLASSES = ("Linear4bit", "Linear8bitLt")


def quantization(
    *,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    quantization_config: Any = None,
    device_map: Any = None,
) -> Any:
    """The quantisation config to load with, None for none.

    Args:
        load_in_4bit: nf4 with double quantisation, computing in bfloat16 where the device can,
            else float32.
        load_in_8bit: LLM.int8().
        quantization_config: one of the caller's own, taken as it is.
        device_map: where the model goes, as for `from_pretrained`.

    Raises:
        ValueError: more than one of the three.
        ImportError: bitsandbytes is not installed.
    """
    given = {
        "load_in_4bit": load_in_4bit,
        "load_in_8bit": load_in_8bit,
        "quantization_config": quantization_config is not None,
    }
    named = [name for name, on in given.items() if on]
    if len(named) > 1:
        raise ValueError(f"only one of {', '.join(given)} can be given, got {' and '.join(named)}")
    if not (load_in_4bit or load_in_8bit):
        return quantization_config
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(
            f'{named[0]}=True needs bitsandbytes; install it with: pip install "pitome-vlm[quant]"'
        )
    if load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(SKIPPED))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype(device_map),
        llm_int8_skip_modules=list(SKIPPED),
    )


def compute_dtype(device_map: Any = None) -> torch.dtype:
    """bfloat16 where the device multiplies it in hardware, else float32.

    Args:
        device_map: a device or the name of one; anything else (None, "auto", a dict) means the
            accelerator of this machine, or the CPU where there is none.
    """
    device = _named_device(device_map) or _best_device()
    module = torch.get_device_module(device)
    if device.type == "cpu":
        flags = module.get_capabilities() if hasattr(module, "get_capabilities") else {}
        supported = any(on for name, on in flags.items() if name.endswith("bf16"))
    elif hasattr(module, "is_bf16_supported"):
        supported = module.is_bf16_supported(including_emulation=False)
    else:
        supported = False
    return torch.bfloat16 if supported else torch.float32


def quantised_modules(model: nn.Module) -> list[str]:
    """Paths of the linear layers that bitsandbytes has quantised."""
    return [
        name
        for name, module in model.named_modules()
        if any(cls.__name__ in QUANTISED_CLASSES for cls in type(module).__mro__)
    ]


def check_quantised(model: nn.Module) -> None:
    """See that the language model was quantised, and tower and projector were not.

    Raises:
        RuntimeError: otherwise, naming a module.
    """
    found = quantised_modules(model)
    wrong = [name for name in found if any(part in name.split(".") for part in UNQUANTISED)]
    if wrong:
        raise RuntimeError(
            f"{len(wrong)} modules of {' and '.join(UNQUANTISED)} were quantised although they "
            f"must not be, the first is {wrong[0]}; pass a quantization_config whose "
            "llm_int8_skip_modules this release of transformers understands"
        )
    if not found:
        raise RuntimeError(
            "no linear layer of the language model was quantised; pass a quantization_config of "
            "your own, or load without quantisation"
        )


def _named_device(device_map: Any) -> torch.device | None:
    if isinstance(device_map, int) and not isinstance(device_map, bool):
        accelerator = torch.accelerator.current_accelerator()
        return torch.device(accelerator.type, device_map) if accelerator else None
    if isinstance(device_map, (str, torch.device)):
        try:
            return torch.device(device_map)
        except RuntimeError:
            return None  # "auto" and its relatives
    return None


def _best_device() -> torch.device:
    return torch.accelerator.current_accelerator() or torch.device("cpu")
