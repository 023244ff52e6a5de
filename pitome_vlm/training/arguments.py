"""`TrainingArguments` with the recipe's defaults, on every supported release of transformers.

Also lists the arguments that must not change when a run is resumed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from typing import Any

import torch
from transformers import TrainingArguments

from ..common import shown, suggest, whole_number
from ..loading.quantization import compute_dtype
from ..releases import RENAMED_TRAINING_ARGUMENTS

DEFAULTS: dict[str, Any] = {
    "learning_rate": 2e-4,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.03,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 8,
    "logging_steps": 10,
    "save_strategy": "steps",
    "save_steps": 0.1,
    "save_total_limit": 2,
    "report_to": "none",
    "seed": 0,
}
# The result depends on these; a run is only resumed with the same values.
IDENTITY = (
    "learning_rate",
    "lr_scheduler_type",
    "num_train_epochs",
    "max_steps",
    "weight_decay",
    "max_grad_norm",
    "label_smoothing_factor",
    "optim",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "seed",
    "data_seed",
    "bf16",
    "fp16",
)
_COUNTS = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
)
_PACKAGES = ("wandb", "tensorboard", "mlflow", "trackio", "comet_ml", "clearml", "neptune")


def training_arguments(
    output_dir: str | os.PathLike[str], device: torch.device, *, progress: bool, **given: Any
) -> TrainingArguments:
    """The arguments of a run.

    Args:
        output_dir: folder for checkpoints.
        device: of the model; on "cpu" the Trainer stays there.
        progress: show a progress bar.
        **given: fields of `TrainingArguments`; `warmup_ratio` and `gradient_checkpointing` work
            on every release. `bf16` (otherwise, on accelerators, `fp16`) is on by default if the
            hardware supports it.

    Raises:
        ValueError: an unknown field, or a value that `TrainingArguments` refuses.
        ImportError: `report_to` names a package that is not installed.
    """
    known = {item.name for item in dataclasses.fields(TrainingArguments) if item.init}
    values = DEFAULTS | {name: value for name, value in given.items() if value is not None}
    # Under the names of all releases.
    if values.get("group_by_length") or values.get("train_sampling_strategy") == "group_by_length":
        raise ValueError(
            "group_by_length needs the lengths of all rows, which are known once images are read; "
            "leave it out"
        )
    if values.get("gradient_checkpointing"):
        # Reentrant checkpoints lose gradients if a region's inputs need none, as here.
        values.setdefault("gradient_checkpointing_kwargs", {"use_reentrant": False})
    if values.get("bf16") is None and values.get("fp16") is None:
        mixed = compute_dtype(device)
        values |= {"bf16": mixed == torch.bfloat16, "fp16": mixed == torch.float16}
    values = {_name(name, known): value for name, value in values.items()}
    for name in values:
        if name not in known:
            raise ValueError(f"unknown training argument {name!r}.{suggest(name, sorted(known))}")
    _check_report(values["report_to"])
    _check_amounts(values)
    arguments = TrainingArguments(
        **{
            "output_dir": os.fspath(output_dir),
            "use_cpu": device.type == "cpu",
            "remove_unused_columns": False,
            "label_names": ["labels"],
            "disable_tqdm": not progress,
        }
        | values
    )
    # With one process and several GPUs the Trainer would copy the model to all of them at every
    # step (DataParallel); torchrun uses them better.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def identity(arguments: TrainingArguments) -> dict[str, Any]:
    """The values that must not change when a run is resumed, as plain JSON."""
    values = {name: getattr(arguments, name) for name in IDENTITY}
    values = {name: getattr(value, "value", value) for name, value in values.items()}
    return values | {
        "warmup": getattr(arguments, "warmup_ratio", None) or arguments.warmup_steps,
        "batch": global_batch(arguments),
    }


def global_batch(arguments: TrainingArguments) -> int:
    """Conversations per optimiser step, over all processes."""
    per_process = arguments.per_device_train_batch_size * max(1, arguments.n_gpu)
    return int(per_process * arguments.gradient_accumulation_steps * arguments.world_size)


def _name(name: str, known: set[str]) -> str:
    new = RENAMED_TRAINING_ARGUMENTS.get(name)
    if name == "warmup_ratio":
        return name if name in known else "warmup_steps"
    return new if new in known else name


def _check_amounts(values: dict[str, Any]) -> None:
    """Refuse what would train nothing, or fail once the run has begun."""
    for name in _COUNTS:
        if name in values:
            whole_number(name, values[name], 1)
    epochs, steps = values["num_train_epochs"], values.get("max_steps", -1)
    # Whole epochs count if `max_steps` is not above 0.
    if steps != -1:
        whole_number("max_steps", steps, 1)
    elif not (isinstance(epochs, (int, float)) and epochs > 0):
        raise ValueError(f"num_train_epochs must be above 0, got {shown(epochs)}")


def _check_report(report_to: Any) -> None:
    wanted = [report_to] if isinstance(report_to, str) else list(report_to or ())
    for name in wanted:
        if name in _PACKAGES and importlib.util.find_spec(name) is None:
            if name == "tensorboard" and importlib.util.find_spec("tensorboardX"):
                continue
            raise ImportError(f"report_to={name} needs {name}; install it with: pip install {name}")
