"""Loads the model that `--model_args` describes, on this process's device, with its adapter."""

from __future__ import annotations

import os
from typing import Any

import torch

from ..common import require
from ..loading.checkpoints import squeezed
from ..loading.encoders import refuse_encoder
from ..loading.models import load
from .arguments import ModelArguments


def load_model(arguments: ModelArguments, accelerator: Any) -> tuple[Any, Any]:
    """(model in eval mode, processor), wrapped as asked; `accelerator` says which process this is.

    Raises:
        ValueError: a device that several processes cannot share, or see `pitome_vlm.load`.
        ImportError: PEFT is needed and not installed.
    """
    _check_adapter(arguments.peft)
    refuse_encoder(arguments.pretrained, arguments.revision)
    device_map = _placement(arguments, accelerator)
    model, processor = load(
        arguments.pretrained,
        dtype=_dtype(arguments, device_map),
        device_map=device_map,
        attn_implementation=arguments.attn_implementation,
        load_in_4bit=arguments.load_in_4bit,
        load_in_8bit=arguments.load_in_8bit,
        revision=arguments.revision,
        **arguments.merging,
    )
    if arguments.peft is not None:
        model = _with_adapter(model, arguments.peft)
    return model.eval(), processor


def _placement(arguments: ModelArguments, accelerator: Any) -> Any:
    device: torch.device = accelerator.device
    if accelerator.num_processes == 1:
        if arguments.device_map is not None:
            return arguments.device_map
        return arguments.device or str(device)
    if arguments.device_map is not None:
        raise ValueError(
            f"device_map={arguments.device_map} cannot be used with {accelerator.num_processes} "
            "processes: each of them has a device of its own"
        )
    if arguments.device is not None and torch.device(arguments.device).type != device.type:
        raise ValueError(
            f"device={arguments.device} does not agree with the processes, which run on "
            f"{device.type}; set ACCELERATE_USE_CPU=true to evaluate on CPUs"
        )
    return str(device)


def _dtype(arguments: ModelArguments, device_map: Any) -> str:
    if arguments.dtype is not None:
        return arguments.dtype
    # Half precision on a CPU is slow, and the answers to a question then depend on which other
    # questions are in its batch.
    quantised = arguments.load_in_4bit or arguments.load_in_8bit
    return "float32" if _on_cpu(device_map) and not quantised else "auto"


def _on_cpu(device_map: Any) -> bool:
    places = device_map.values() if isinstance(device_map, dict) else [device_map]
    if any(str(place) == "cpu" for place in places):
        return all(str(place) == "cpu" for place in places)
    return torch.accelerator.current_accelerator(check_available=True) is None


def _check_adapter(path: str | None) -> None:
    """Say what is wrong with a local adapter before a large checkpoint is read."""
    if path is None:
        return
    if os.path.isdir(path):
        if not os.path.isfile(os.path.join(path, "adapter_config.json")):
            raise ValueError(f"peft={path} holds no adapter_config.json; give a PEFT adapter")
    elif os.path.exists(path) or path.startswith((".", "~", os.sep)) or path.count("/") > 1:
        raise FileNotFoundError(f"peft={path}: no such folder; give the folder of a PEFT adapter")


def _with_adapter(model: Any, path: str) -> Any:
    require("peft", "train", "peft=...")
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, path)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"peft={path}: the adapter does not load: {squeezed(error)}") from error
