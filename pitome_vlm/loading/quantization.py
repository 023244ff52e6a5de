"""4-bit and 8-bit loading through bitsandbytes, of the language model only.

Vision tower and projector stay in 16 bits: they are a few percent of the weights, and tokens are
compared by the tower's features. The result is checked after loading, and layers that would not
pass gradients on are repaired.
"""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from ..adapters import find_adapter
from ..adapters.parts import PROJECTORS, TOWERS
from ..common import require
from ..wrapping.peft_record import quantization_of
from ..wrapping.wrap import base_model

# Releases read these patterns differently (substring of the path, or anchored at its start), so
# both spellings are given and the result is checked.
UNQUANTISED = (*TOWERS, *PROJECTORS)
SKIPPED = ("lm_head", *UNQUANTISED, *(f"model.{name}" for name in UNQUANTISED))
QUANTISED_CLASSES = ("Linear4bit", "Linear8bitLt")
OFFLOADED = frozenset({"cpu", "disk"})
# The AVX512-BF16 kernel of bitsandbytes takes this many rows at once.
_PACKED_ROWS = 32


def quantization(
    *,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    quantization_config: Any = None,
    device_map: Any = None,
) -> Any:
    """The quantisation config to load with; None to load without.

    Args:
        load_in_4bit: nf4 with double quantisation, computing in `compute_dtype(device_map)`.
        load_in_8bit: LLM.int8().
        quantization_config: the caller's own, taken as it is.
        device_map: as for `from_pretrained`. If a dict uses an accelerator, the modules that it
            puts on "cpu" or "disk" are not quantised (bitsandbytes).

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
    require("bitsandbytes", "quant", f"{named[0]}=True")
    shared = {
        "llm_int8_skip_modules": list(SKIPPED),
        "llm_int8_enable_fp32_cpu_offload": _offloads(device_map),
    }
    if load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True, **shared)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype(device_map),
        **shared,
    )


def recorded_quantization(values: dict[str, Any], device_map: Any = None) -> Any:
    """The quantisation config that an adapter was trained with, for the device of this machine.

    Args:
        values: see `wrapping.peft_record.recorded`.
        device_map: as for `from_pretrained`; bfloat16 is replaced if the device lacks it.

    Raises:
        ImportError: bitsandbytes is not installed.
        ValueError: the values are those of another method, or damaged.
    """
    if values.get("quant_method") != "bitsandbytes":
        raise ValueError(
            f"unknown quantisation method {values.get('quant_method')!r}; bitsandbytes is supported"
        )
    require("bitsandbytes", "quant", "a model that was quantised in training")
    config = BitsAndBytesConfig.from_dict(dict(values))
    if config.bnb_4bit_compute_dtype == torch.bfloat16:
        config.bnb_4bit_compute_dtype = compute_dtype(device_map)
    config.llm_int8_enable_fp32_cpu_offload |= _offloads(device_map)
    return config


def compute_dtype(device_map: Any = None) -> torch.dtype:
    """The dtype to compute in: one with hardware support on the device.

    Args:
        device_map: a device or the name of one; anything else (None, "auto", a dict) means the
            accelerator of this machine, or the CPU if there is none.

    Returns:
        bfloat16 if the hardware has it; otherwise float16 on an accelerator, float32 on a CPU.
    """
    device = _named_device(device_map) or _best_device()
    module = torch.get_device_module(device)
    if device.type == "cpu":
        flags = module.get_capabilities() if hasattr(module, "get_capabilities") else {}
        supported = any(on for name, on in flags.items() if name.endswith("bf16"))
        return torch.bfloat16 if supported else torch.float32
    if hasattr(module, "is_bf16_supported"):
        supported = module.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if supported else torch.float16
    return torch.float32


def unquantised_dtype(
    dtype: str | torch.dtype, checkpoint: Any, device_map: Any = None
) -> str | torch.dtype:
    """The dtype for tower, projector and embeddings of a quantised model.

    Args:
        dtype: as requested; anything but "auto" is taken as it is.
        checkpoint: dtype the checkpoint was saved in; None if it does not say.
        device_map: as for `from_pretrained`.

    Returns:
        "auto" (the checkpoint's own), or for a float32 checkpoint `compute_dtype(device_map)`.
    """
    if dtype != "auto" or checkpoint != torch.float32:
        return dtype
    return compute_dtype(device_map)


def quantised_modules(model: nn.Module) -> list[str]:
    """Paths of the linear layers that bitsandbytes has quantised."""
    return [name for name, module in model.named_modules() if _is_quantised(module)]


def check_quantised(model: nn.Module, *, language_model_only: bool = False) -> None:
    """Check that the right layers were quantised.

    Releases of transformers read `llm_int8_skip_modules` differently and do not report an entry
    that matches no module, so the loaded model itself is inspected.

    Args:
        model: loaded with a bitsandbytes config; other models pass.
        language_model_only: require every linear layer of the language model to be quantised
            (except lm_head and layers offloaded to "cpu" or "disk"), and none of tower and
            projector.

    Raises:
        RuntimeError: a layer was quantised that should not be, or the other way round.
    """
    config = quantization_of(model)
    if config is None:
        return
    found = quantised_modules(model)
    if not found:
        raise RuntimeError(
            "no linear layer of the language model was quantised; pass your own "
            "quantization_config, or load without quantisation"
        )
    wishes = list(config.llm_int8_skip_modules or ())
    kept = _vision(model) if language_model_only else []
    for wish in [*wishes, *kept]:
        wrong = [name for name in found if _is_part(name, wish)]
        if wrong:
            raise RuntimeError(
                f"{len(wrong)} modules of {wish!r} were quantised but must not be, the first is "
                f"{wrong[0]}; this release of transformers reads llm_int8_skip_modules "
                f"from the start of a path: name {wrong[0][: _end_of(wrong[0], wish)]!r} in the "
                "quantization_config as well"
            )
    if language_model_only:
        _check_all_quantised(model, wishes)


def allow_gradients(model: nn.Module) -> int:
    """Make 4-bit layers pass gradients on, whatever ran before; in place.

    On CPUs with AVX512-BF16, bitsandbytes (0.50) repacks the weights of a `Linear4bit` in the
    first forward pass outside training, for a kernel without gradients: training then silently
    changes nothing, even after `train()`. This function tells the layers not to repack, and
    unpacks those that did. Call it before training, and before any evaluation between training
    steps. Inference gives the same answers, but is slower on such CPUs.

    Args:
        model: with or without quantised layers, also inside a `PeftModel`.

    Returns:
        How many layers had been repacked; a warning says that this rounded their scales.
    """
    repacked = 0
    layers: list[Any] = [module for module in model.modules() if _is_a(module, "Linear4bit")]
    for module in layers:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        state = getattr(module.weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as unpack

            module.weight.data, module.weight.quant_state = unpack(module.weight.data, state)
            repacked += 1
    if repacked:
        warnings.warn(
            f"{repacked} 4-bit layers had been repacked for CPU inference, which has no gradients, "
            "and were unpacked; the repacking rounded their scales, so load the model again and "
            "train before the first forward pass where that matters",
            stacklevel=2,
        )
    return repacked


def keep_unpackable(model: nn.Module) -> int:
    """Keep bitsandbytes from repacking 4-bit layers that it cannot repack; in place.

    On CPUs with AVX512-BF16 the first forward pass repacks every `Linear4bit` row by row.
    bitsandbytes (0.50) fails there with a shape error if a row is not a whole number of
    quantisation blocks, or the number of rows is not a multiple of the kernel's.

    Args:
        model: with or without quantised layers.

    Returns:
        How many layers will not be repacked.
    """
    kept = 0
    layers: list[Any] = [module for module in model.modules() if _is_a(module, "Linear4bit")]
    for module in layers:
        state = getattr(module.weight, "quant_state", None)
        if state is None or not getattr(module, "support_avx512bf16_for_cpu", False):
            continue
        if module.in_features % state.blocksize or module.out_features % _PACKED_ROWS:
            module.support_avx512bf16_for_cpu = False
            kept += 1
    return kept


def _vision(model: nn.Module) -> list[str]:
    """Paths of the vision tower and the projector."""
    base = base_model(model)
    parts = find_adapter(base).parts(base)
    wanted = (*parts.towers, parts.projector)
    return [name for name, module in base.named_modules() if any(module is one for one in wanted)]


def _check_all_quantised(model: nn.Module, skipped: list[str]) -> None:
    placed = getattr(model, "hf_device_map", None) or {}
    accelerators = {str(place) for place in placed.values()} - OFFLOADED
    away = [name for name, place in placed.items() if accelerators and str(place) in OFFLOADED]
    base = base_model(model)
    roots = find_adapter(base).parts(base).language_model
    inside = {module for root in roots for module in root.modules()}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or _is_quantised(module):
            continue
        exempt = any(_is_part(name, wish) for wish in skipped)
        if module in inside and not exempt:
            if any(name == there or name.startswith(f"{there}.") for there in away):
                continue
            raise RuntimeError(
                f"{name} of the language model should be quantised but is not; pass your own "
                "quantization_config, or load without quantisation"
            )


def _is_part(name: str, wish: str) -> bool:
    """Whether an entry of `llm_int8_skip_modules` is meant to cover a module."""
    if f".{wish}." in f".{name}.":
        return True
    try:
        return re.match(rf"(?:{wish})(?:\.|$)", name) is not None
    except re.error:
        return False


def _end_of(name: str, wish: str) -> int:
    found = f".{name}.".find(f".{wish}.")
    return len(name) if found < 0 else found + len(wish)


def _is_quantised(module: nn.Module) -> bool:
    return any(_is_a(module, name) for name in QUANTISED_CLASSES)


def _is_a(module: nn.Module, class_name: str) -> bool:
    # PEFT's layers around quantised ones have the same names.
    return any(
        cls.__name__ == class_name and cls.__module__.startswith("bitsandbytes")
        for cls in type(module).__mro__
    )


def _offloads(device_map: Any) -> bool:
    """Whether some modules go to an accelerator and others to "cpu" or "disk"."""
    places = {str(place) for place in device_map.values()} if isinstance(device_map, dict) else ()
    return bool(set(places) & OFFLOADED) and bool(set(places) - OFFLOADED)


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
