"""How `pitome-vlm train` carries a run through: check, load, train, say.

Knows: what is refused before a model is loaded, which process speaks, and what is said meanwhile.
Does not know: options, or how anything is trained (`pitome_vlm.training`).
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .eval_run import is_first
from .options import LoadOptions
from .terminal import err, say, write

if TYPE_CHECKING:
    from ..training import TrainingResult

TOLD = 10  # lines of progress where there is no terminal to draw a bar on


@dataclass(frozen=True)
class Plan:
    """A request as it was typed.

    Attributes:
        loading: the model.
        base: the base model of an adapter.
        merging: see `MergeOptions.given`.
        output: the adapter's folder.
        data: training and validation data.
        opening: arguments of `open_conversations`.
        lora: fields of `LoraOptions`, None where not given.
        resume: go on with the run in the folder.
        rest: further arguments of `pitome_vlm.training.train`.
    """

    loading: LoadOptions
    base: str | None
    merging: dict[str, Any]
    output: Path
    data: tuple[str, str | None]
    opening: dict[str, Any]
    lora: dict[str, Any]
    resume: bool
    rest: dict[str, Any]


def carry_through(plan: Plan) -> TrainingResult:
    """Check everything that needs no model, load it, and train."""
    from ..training import LoraOptions, open_conversations, train
    from ..training.run_files import RunFolder

    given = {name: value for name, value in plan.lora.items() if value is not None}
    lora = LoraOptions(**given)
    RunFolder(plan.output).check(resume=plan.resume)
    data, val_data = (
        None if source is None else open_conversations(source, **plan.opening)
        for source in plan.data
    )
    if data is not None:
        tell(f"{len(data)} conversations; loading the model ...")
    model, processor = _load(plan)
    bar = err.is_terminal and is_first()
    return train(
        model,
        processor,
        data,
        plan.output,
        val_data=val_data,
        # An adapter that is trained on has its options already; others are refused by `train`.
        lora=lora if given or not hasattr(model, "peft_config") else None,
        resume=plan.resume,
        progress=bar,
        callbacks=() if bar else (_lines(),),
        **plan.rest,
    )


def show(result: TrainingResult) -> None:
    """The adapter's folder to stdout, the accuracies for the person at the terminal."""
    from .session import merging_line

    write(f"{result.output_dir}")
    say(f"{result.steps} steps, {merging_line(result.model)}")
    if result.before and result.after:
        for name, title in (("answer_accuracy", "answers"), ("token_accuracy", "answer tokens")):
            before, after = 100 * result.before[name], 100 * result.after[name]
            say(f"{title} right: {before:.1f} % before, {after:.1f} % after")
        say(f"on {result.after['answers']} validation answers")


def tell(text: str) -> None:
    """One line, from the first process only."""
    if is_first():
        say(text)


def _load(plan: Plan) -> tuple[Any, Any]:
    from ..loading.models import load, saved_merge_config
    from ..loading.peft import find_adapter_at
    from ..loading.quantization import compute_dtype
    from .session import check_algorithm, model_path

    check_algorithm(plan.merging)
    loading, path = plan.loading, model_path(plan.loading.model)
    if not plan.merging and saved_merge_config(path) is None:
        raise ValueError(
            "give one of --keep, --tokens and --ratio (--keep 1 trains without merging)"
        )
    device, dtype = loading.device or _device(), loading.dtype
    if dtype is None and find_adapter_at(path) is None:
        dtype = str(compute_dtype(device)).removeprefix("torch.")
    return load(
        path,
        load_in_4bit=loading.load_4bit,
        load_in_8bit=loading.load_8bit,
        dtype=dtype,
        device_map=device,
        base=plan.base,
        trainable=True,
        **plan.merging,
    )


def _device() -> str:
    """The accelerator of this process, or the CPU."""
    import torch

    device = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if device is None else f"{device.type}:{os.environ.get('LOCAL_RANK', '0')}"


def _lines() -> Any:
    """A callback that says now and then how far it is."""
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
            part = TOLD * state.global_step // max(1, state.max_steps)
            done = state.global_step - self.first
            if part == self.told or "loss" not in (logs or {}) or not done:
                return
            self.told = part
            seconds = (time.monotonic() - self.begun) / done * (state.max_steps - state.global_step)
            left = f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
            loss = float(logs["loss"])
            tell(f"step {state.global_step}/{state.max_steps}: loss {loss:.3f}, {left} left")

    return Lines()
