"""`pitome-vlm train`: LoRA and QLoRA with merging on.

Checks the options; `train_run.py` loads the model and shows progress, and `pitome_vlm.training`
trains.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from ..common import require
from . import options as o
from .session import is_first_process
from .terminal import quiet
from .train_run import check_data, load_trainable, show, train_model

_data, _lora, _training = o.panel("Data"), o.panel("Adapter"), o.panel("Training")

Data = Annotated[
    str,
    _data(
        "Training data: JSON or JSONL file in LLaVA's format, or a Hugging Face dataset with "
        "images and messages.",
        "FILE",
    ),
]
Output = Annotated[Path, o.output_option("Folder for the adapter.")]
ImageFolder = Annotated[
    Path | None,
    _data(
        "Folder that image paths in the data are relative to; default: the data's folder.", "DIR"
    ),
]
Split = Annotated[str, _data("Split of a Hugging Face dataset to train on.", "NAME")]
ValData = Annotated[
    str | None, _data("Held-out data to measure accuracy on before and after training.", "FILE")
]
ValFraction = Annotated[
    float | None, _data("Fraction of the data to hold out, in place of --val-data.", "F")
]
TextOnly = Annotated[bool, _data("Accept conversations without an image.", None, "--text-only")]
MaxLength = Annotated[
    int | None,
    _data(
        "Longest conversation in tokens, counted before merging; default: the model's limit.",
        "N",
        min=1,
    ),
]
Budgets = Annotated[
    str | None,
    _training(
        "Budgets (token counts or fractions) to draw from at every step, so that one adapter "
        "works at all of them.",
        "N,N",
    ),
]
Base = Annotated[
    str | None,
    o.loading(
        "Base model of the adapter given as --model, if it is no longer where it was.", "PATH"
    ),
]
Rank = Annotated[int | None, _lora("LoRA rank; default: 32.", "N", min=1)]
Alpha = Annotated[
    float | None, _lora("LoRA alpha (updates are scaled by alpha / rank); default: 64.", "A")
]
Dropout = Annotated[float | None, _lora("LoRA dropout; default: 0.", "F")]
Projector = Annotated[bool, _lora("Also adapt the projector.", None, "--projector")]
Tower = Annotated[bool, _lora("Also adapt the vision tower.", None, "--vision-tower")]
Epochs = Annotated[float | None, _training("Passes over the data; default: 1.", "N")]
Steps = Annotated[int | None, _training("Optimiser steps, in place of --epochs.", "N", min=1)]
BatchSize = Annotated[int, _training("Conversations per batch and device.", "N", min=1)]
Accumulate = Annotated[int, _training("Batches per optimiser step.", "N", min=1)]
Rate = Annotated[float, _training("Peak learning rate.", "F", "--learning-rate", "--lr")]
Checkpointing = Annotated[
    bool,
    _training(
        "Recompute activations in the backward pass: less memory, more time.",
        None,
        "--gradient-checkpointing",
    ),
]
Seed = Annotated[int, _training("Random seed.", "N", min=0)]
ReportTo = Annotated[
    str, _training("Where to log the training: wandb, tensorboard, ... or none.", "NAME,NAME")
]
TrainingArgs = Annotated[
    str,
    _training(
        "Other fields of transformers' TrainingArguments, for instance bf16=False,eval_steps=50.",
        "K=V,K=V",
    ),
]


def train(
    model: o.Model,
    data: Data,
    output: Output,
    image_folder: ImageFolder = None,
    split: Split = "train",
    val_data: ValData = None,
    val_fraction: ValFraction = None,
    text_only: TextOnly = False,
    max_length: MaxLength = None,
    merging: o.FixedMerging = o.FixedMerging(),
    budgets: Budgets = None,
    rank: Rank = None,
    alpha: Alpha = None,
    dropout: Dropout = None,
    projector: Projector = False,
    vision_tower: Tower = False,
    epochs: Epochs = None,
    max_steps: Steps = None,
    batch_size: BatchSize = 4,
    accumulate: Accumulate = 1,
    learning_rate: Rate = 2e-4,
    gradient_checkpointing: Checkpointing = False,
    seed: Seed = 0,
    report_to: ReportTo = "none",
    training_args: TrainingArgs = "",
    resume: o.Resume = False,
    overwrite: o.Overwrite = False,
    loading: o.Loading = o.Loading(),
    base: Base = None,
    verbose: o.Verbose = False,
) -> None:
    """Train a LoRA adapter while tokens are merged; QLoRA with --load-4bit.

    The adapter remembers base model, quantisation and merging: every command and
    `pitome_vlm.load` accept its folder as a model. Without a budget, a quarter of the visual tokens
    is kept, or what the model's own pitome_config.json says; --keep 1 trains without merging. Needs
    the extra train: `pip install ".[train]"` in a clone of the repository.

    Example: `pitome-vlm train --model PATH --data train.jsonl --val-fraction 0.02 --keep 0.25
    --load-4bit -o adapter`
    """
    require("peft", "train", "train")
    o.check_run_flags(resume, overwrite, output)
    check_data(data, val_data, val_fraction, image_folder)
    given = merging.given()
    lora = _lora_fields(rank, alpha, dropout, projector=projector, vision_tower=vision_tower)
    rest = {
        "budgets": _budgets(budgets),
        "max_length": max_length,
        "num_train_epochs": epochs,
        "max_steps": max_steps,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulate,
        "learning_rate": learning_rate,
        "gradient_checkpointing": gradient_checkpointing or None,
        "seed": seed,
        "report_to": o.words("report_to", report_to),
    } | o.pairs("training_args", training_args)
    opening = {"image_folder": image_folder, "split": split, "text_only": text_only}
    with quiet(verbose):
        result = train_model(
            lambda: load_trainable(model, given, base, **vars(loading)),
            output,
            data=data,
            val_data=val_data,
            val_fraction=val_fraction,
            opening=opening,
            lora=lora,
            resume=resume,
            overwrite=overwrite,
            rest=rest,
        )
    if is_first_process():
        show(result)


def _lora_fields(
    rank: int | None,
    alpha: float | None,
    dropout: float | None,
    *,
    projector: bool,
    vision_tower: bool,
) -> dict[str, Any]:
    """The fields of `LoraOptions` that were given."""
    more = [*(["projector"] * projector), *(["vision_tower"] * vision_tower)]
    parts = ("language_model", *more) if more else None
    lora = {"rank": rank, "alpha": alpha, "dropout": dropout, "parts": parts}
    return {name: value for name, value in lora.items() if value is not None}


def _budgets(text: str | None) -> list[float]:
    """Token counts as whole numbers, fractions as they are."""
    if text is None:
        return []
    numbers = o.fractions("budgets", text)
    return [int(n) if n.is_integer() and n > 1 else n for n in numbers]
