"""`train`: supervised fine-tuning of an adapter with merging on, from data to saved result.

Nothing is written before everything is checked.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import PrinterCallback, ProgressCallback, TrainingArguments

from ..common import whole_number
from ..measure.provenance import versions
from ..wrapping.encode import planned_schedule
from ..wrapping.peft import remember_training
from ..wrapping.peft_record import recorded
from ..wrapping.wrap import base_model, merge_config
from .answers import LOOKED_AT, answers_lost, check_answers
from .arguments import global_batch, identity, training_arguments
from .collate import Collator
from .examples import Conversations
from .lora import LoraOptions, prepare
from .run_files import RunFolder
from .sources import open_conversations
from .trainer import MergingTrainer, ProgressLine, with_budget


@dataclass(frozen=True)
class TrainingResult:
    """The result of `train`.

    Attributes:
        model: the `PeftModel`, in eval mode, wrapped as before.
        output_dir: folder of the saved adapter, for `pitome_vlm.load`.
        steps: optimiser steps.
        before: `loss`, `answer_accuracy`, `token_accuracy` and `answers` of the merged, untrained
            model on the validation data; None without validation data.
        after: the same with the adapter.
        history: the Trainer's log, one dict per entry.
    """

    model: Any
    output_dir: Path
    steps: int
    before: dict[str, float] | None
    after: dict[str, float] | None
    history: list[dict[str, Any]]


def train(
    model: Any,
    processor: Any,
    train_data: Any,
    output_dir: str | os.PathLike[str],
    *,
    val_data: Any = None,
    val_fraction: float | None = None,
    image_folder: str | os.PathLike[str] | None = None,
    split: str = "train",
    text_only: bool = False,
    lora: LoraOptions | None = None,
    budgets: Sequence[float] = (),
    max_length: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = False,
    callbacks: Sequence[Any] = (),
    **arguments: Any,
) -> TrainingResult:
    """Train a LoRA adapter on a wrapped model, with merging as it will be in use.

    QLoRA if the model was loaded with `load_in_4bit` or `load_in_8bit`. The loss is on answers
    only. Under `torchrun` or `accelerate launch`, every process calls this alike.

    Args:
        model: wrapped with the budget to train for; the adapter of a `PeftModel` is trained on.
        processor: its processor.
        train_data: file, dataset or records; see `open_conversations`.
        output_dir: a new or empty folder, or that of a run to resume or overwrite.
        val_data: held-out data for accuracy before and after.
        val_fraction: hold out this share of the training data instead.
        image_folder: folder that image paths in files are relative to; None for the file's own.
        split: of a dataset that has several.
        text_only: accept records without an image.
        lora: size and place of a new adapter.
        budgets: draw one of these at every step, so that one adapter serves all of them (whole
            numbers are tokens per image, others fractions to keep). Empty for the model's own.
        max_length: longest row in tokens before merging; None for the language model's limit.
        resume: resume the run in the folder, from the start if it has no checkpoint yet.
        overwrite: delete the run in the folder before the first step.
        progress: show a progress bar on stderr.
        callbacks: more callbacks for the Trainer.
        **arguments: fields of `TrainingArguments`, for instance `learning_rate`,
            `num_train_epochs`, `bf16` or `push_to_hub`; `arguments.DEFAULTS` has other defaults.

    Raises:
        DataError: a record is wrong; the message names its line.
        FileExistsError: the output folder is not empty.
        ValueError: an option is out of range, the model is not wrapped, or the folder holds
            another run.
        ImportError: PEFT, or a package that an option needs, is not installed.
    """
    folder = RunFolder(output_dir)
    folder.check(resume=resume, overwrite=overwrite)
    opening = {"image_folder": image_folder, "split": split, "text_only": text_only}
    data, held_out = _data(train_data, val_data, val_fraction, opening)
    for budget in budgets:
        planned_schedule(model, with_budget(merge_config(model), budget))
    base: Any = base_model(model)
    longest = _longest(base, max_length)
    _check_parts(lora, data)
    # Batches without images leave an adapter on tower or projector without gradients.
    arguments = {"ddp_find_unused_parameters": data.has_text_only} | arguments
    settings = training_arguments(folder.root, base.device, progress=progress, **arguments)
    run = _identity(model, lora) | {
        "budgets": list(budgets),
        "max_length": longest,
        "data": {"train": data.fingerprint, "val": held_out and held_out.fingerprint},
        "arguments": identity(settings),
    }
    if not overwrite:
        folder.compare(run)
    collator = Collator(processor, max_length=longest)
    _check_answers(collator, data, held_out, settings)
    # Ranks and repetitions begin with the same adapter.
    transformers.set_seed(settings.seed)
    trainer = _trainer(
        model,
        lora,
        args=settings,
        train_dataset=data,
        eval_dataset=held_out,
        data_collator=collator,
        budgets=budgets,
        callbacks=list(callbacks),
    )
    _fit(trainer, folder, run, resume=resume, overwrite=overwrite)
    return _finish(trainer, folder, _facts(trainer, data, held_out, run))


def _longest(base: Any, given: int | None) -> int | None:
    """The longest row in tokens; None for any."""
    if given is not None:
        return whole_number("max_length", given, 1)
    return getattr(base.config.get_text_config(), "max_position_embeddings", None)


def _check_parts(lora: LoraOptions | None, data: Conversations) -> None:
    """See that what is trained can learn from conversations without images."""
    adapted = lora.parts if isinstance(lora, LoraOptions) else ("language_model",)
    if data.has_text_only and "language_model" not in adapted:
        raise ValueError(
            f"{data.name} has conversations without an image, from which {', '.join(adapted)} "
            "cannot learn; leave them out, or add language_model to the parts of the adapter"
        )


def _trainer(model: Any, lora: LoraOptions | None, **options: Any) -> MergingTrainer:
    """A Trainer of a model with an adapter; a new one is taken off again if that fails."""
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    prepared = prepare(model, lora)
    try:
        return MergingTrainer(model=prepared, **options)
    except BaseException:
        if prepared is not model:
            prepared.unload()
            for parameter, before in trained.items():
                parameter.requires_grad_(before)
        raise


def _identity(model: Any, lora: LoraOptions | None) -> dict[str, Any]:
    """What a resumed run must have in common with its beginning, as far as the model goes."""
    base: Any = base_model(model)
    merging = merge_config(model).to_dict()
    return {
        "base_model": getattr(base, "name_or_path", None),
        "quantization": recorded(base),
        "merging": {k: v for k, v in merging.items() if k != "pitome_vlm_version"},
        "lora": str(lora or ("continued" if model is not base else LoraOptions())),
    }


def _fit(
    trainer: Any, folder: RunFolder, run: dict[str, Any], *, resume: bool, overwrite: bool
) -> None:
    """Train, from the last complete checkpoint if there is one."""
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback):
        trainer.add_callback(ProgressLine)
    # All processes must have checked the folder before the first one writes into it.
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        if overwrite:
            folder.clear()
        folder.begin(run)
    last = folder.last_checkpoint() if resume else None
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    lost, rows = trainer.rows_without_answer()
    if trainer.is_world_process_zero() and len(trainer.train_dataset) > LOOKED_AT:
        answers_lost(lost, rows, trainer.data_collator.max_length)


def _data(
    train_data: Any, val_data: Any, val_fraction: float | None, opening: dict[str, Any]
) -> tuple[Conversations, Conversations | None]:
    if val_data is not None and val_fraction is not None:
        raise ValueError("only one of val_data and val_fraction can be given")
    data = open_conversations(train_data, **opening)
    if val_fraction is not None:
        return data.split(val_fraction)
    return data, None if val_data is None else open_conversations(val_data, **opening)


def _check_answers(
    collator: Collator,
    data: Conversations,
    held_out: Conversations | None,
    settings: TrainingArguments,
) -> None:
    batch = settings.per_device_train_batch_size * settings.world_size
    if settings.dataloader_drop_last and len(data) < batch:
        raise ValueError(
            f"dataloader_drop_last leaves nothing to train on: {data.name} has {len(data)} "
            f"conversations, and a batch of all processes {batch}"
        )
    first = settings.process_index == 0
    check_answers(collator, data, batch_size=settings.per_device_train_batch_size, tell=first)
    if held_out is not None:
        size = settings.per_device_eval_batch_size
        check_answers(collator, held_out, batch_size=size, tell=first)


def _accuracies(trainer: Any) -> tuple[dict[str, float] | None, dict[str, float] | None]:
    """On the validation data without and with the adapter, at the model's own budget."""
    if trainer.eval_dataset is None:
        return None, None
    with trainer.model.disable_adapter():
        before = trainer.evaluate(metric_key_prefix="before")
    after = trainer.evaluate(metric_key_prefix="after")
    names = ("loss", "answer_accuracy", "token_accuracy", "answers")
    return (
        {name: before[f"before_{name}"] for name in names},
        {name: after[f"after_{name}"] for name in names},
    )


def _facts(
    trainer: Any,
    data: Conversations,
    held_out: Conversations | None,
    run: dict[str, Any],
) -> dict[str, Any]:
    """What is recorded about the training, for the adapter's card."""
    settings: TrainingArguments = trainer.args
    rate, schedule = settings.learning_rate, identity(settings)["lr_scheduler_type"]
    return {
        "data": f"{data.name}, {len(data)} conversations",
        "validation": "" if held_out is None else held_out.name,
        "lora": run["lora"],
        "budgets": run["budgets"],
        "algorithm": run["merging"]["algorithm"],
        "recipe": (
            f"{trainer.state.global_step} steps of {global_batch(settings)} conversations, "
            f"learning rate {rate:g} ({schedule}), seed {settings.seed}"
        ),
        "versions": versions("peft"),
    }


def _finish(trainer: Any, folder: RunFolder, facts: dict[str, Any]) -> TrainingResult:
    """Measure, save the adapter with the record of its training, and return the model."""
    before, after = _accuracies(trainer)
    # Mixed precision patches `forward` on the model; undone, so that it can be used further.
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    if getattr(model.__dict__.get("forward"), "__func__", None) is type(model).forward:
        del model.forward
    remember_training(model, facts | {"before": before, "after": after})
    trainer.save_state()
    trainer.save_model()
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    trainer.accelerator.wait_for_everyone()
    return TrainingResult(
        model=model.eval(),
        output_dir=folder.root,
        steps=trainer.state.global_step,
        before=before,
        after=after,
        history=list(trainer.state.log_history),
    )
