"""How `pitome-vlm train` checks, loads and trains, and what is said meanwhile.

Only the first of several processes speaks.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .session import (
    check_algorithm,
    check_bits,
    checked_device,
    is_first_process,
    merging_line,
    model_path,
    planned_config,
)
from .terminal import duration, err, loading, say, write

if TYPE_CHECKING:
    from ..training import TrainingResult

MOST_LINES = 10  # lines of progress where there is no terminal to draw a bar on


def check_data(
    data: str, val_data: str | None, val_fraction: float | None, image_folder: Path | None
) -> None:
    """Check what needs neither torch nor a look into the data.

    Raises:
        FileNotFoundError: a file or folder is not there.
        ValueError: two kinds of validation data, or a share out of range.
    """
    from ..common import check_range
    from ..loading.records import check_source

    if val_data is not None and val_fraction is not None:
        raise ValueError("only one of --val-data and --val-fraction can be given")
    if val_fraction is not None:
        check_range("--val-fraction", val_fraction, 0, 1, open_ends=True)
    for name, given in (("--data", data), ("--val-data", val_data)):
        if given is not None:
            try:
                check_source(given)
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{name}: {error}") from None
    if image_folder is not None and not image_folder.expanduser().is_dir():
        raise FileNotFoundError(f"--image-folder {image_folder} is not a folder")


def train_model(
    load: Callable[[], tuple[Any, Any]],
    output: Path,
    *,
    data: str,
    val_data: str | None,
    val_fraction: float | None,
    opening: dict[str, Any],
    lora: dict[str, Any],
    resume: bool,
    overwrite: bool,
    rest: dict[str, Any],
) -> TrainingResult:
    """Check everything that needs no model, load it, and train.

    Args:
        load: loads the model and its processor.
        output: the adapter's folder.
        data: training data.
        val_data: validation data.
        val_fraction: share of the training data to hold out.
        opening: further arguments of `open_conversations`.
        lora: fields of `LoraOptions` that were given.
        resume: continue the run in the folder.
        overwrite: replace the run in the folder.
        rest: further arguments of `pitome_vlm.training.train`.
    """
    from ..training import LoraOptions, open_conversations, train
    from ..training.run_files import RunFolder

    options = LoraOptions(**lora)
    RunFolder(output).check(resume=resume, overwrite=overwrite)
    train_set = open_conversations(data, **opening)
    val_set = None if val_data is None else open_conversations(val_data, **opening)
    tell(f"{len(train_set)} conversations")
    if val_fraction is not None:
        train_set, val_set = train_set.split(val_fraction)
    model, processor = load()
    bar = err.is_terminal and is_first_process()
    return train(
        model,
        processor,
        train_set,
        output,
        val_data=val_set,
        # An adapter that is trained further has its options already; `train` refuses others.
        lora=options if lora or not hasattr(model, "peft_config") else None,
        resume=resume,
        overwrite=overwrite,
        progress=bar,
        callbacks=() if bar else (_lines(),),
        **rest,
    )


def show(result: TrainingResult) -> None:
    """Print the adapter's folder to stdout and the accuracies to stderr."""
    write(f"{result.output_dir}", fold=False)
    say(f"{result.steps} steps. {merging_line(result.model)}")
    if result.before and result.after:
        for name, title in (("answer_accuracy", "answers"), ("token_accuracy", "answer tokens")):
            before, after = 100 * result.before[name], 100 * result.after[name]
            say(f"{title} right: {before:.1f} % before, {after:.1f} % after")
        say(f"on {result.after['answers']} validation answers")


def tell(text: str) -> None:
    """Say one line, from the first process only."""
    if is_first_process():
        say(text)


def load_trainable(
    name: str,
    given: dict[str, Any],
    base: str | None = None,
    *,
    load_4bit: bool = False,
    load_8bit: bool = False,
    dtype: str | None = None,
    device: str | None = None,
) -> tuple[Any, Any]:
    """(model, processor) with merging on, in a dtype that this device trains well in.

    Without a device it goes to the accelerator of this process, if there is one; `base` is the
    base model of an adapter.
    """
    from ..loading.encoders import refuse_encoder
    from ..loading.models import load
    from ..loading.peft import find_adapter_at
    from ..loading.quantization import compute_dtype

    check_algorithm(given)
    check_bits(load_4bit, load_8bit)
    place, path = checked_device(device) or _device(), model_path(name)
    refuse_encoder(path)
    config, origin = planned_config(name, given, base=base)
    if dtype is None and find_adapter_at(path) is None:
        dtype = str(compute_dtype(place)).removeprefix("torch.")
    if is_first_process():
        loading(f"the model from {name}")
    model, processor = load(
        path,
        load_in_4bit=load_4bit,
        load_in_8bit=load_8bit,
        dtype=dtype,
        device_map=place,
        base=base,
        trainable=True,
        config=config,
    )
    if origin:
        tell(merging_line(model, origin))
    return model, processor


def _device() -> str:
    """The accelerator of this process, or the CPU."""
    import torch

    device = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if device is None else f"{device.type}:{os.environ.get('LOCAL_RANK', '0')}"


def _lines() -> Any:
    """A callback that prints progress a few times during the training."""
    from transformers import TrainerCallback

    class Lines(TrainerCallback):
        def __init__(self) -> None:
            self.begun, self.first, self.told = 0.0, 0, -1

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            del args, control, kwargs
            self.begun, self.first = time.monotonic(), state.global_step

        def on_log(
            self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any
        ) -> None:
            del args, control, kwargs
            part = MOST_LINES * state.global_step // max(1, state.max_steps)
            done = state.global_step - self.first
            if part == self.told or "loss" not in (logs or {}) or not done:
                return
            self.told = part
            seconds = (time.monotonic() - self.begun) / done * (state.max_steps - state.global_step)
            loss = float(logs["loss"])
            step = f"step {state.global_step}/{state.max_steps}"
            tell(f"{step}: loss {loss:.3f}, {duration(seconds)} left")

    return Lines()
