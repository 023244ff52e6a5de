"""`pitome-vlm train`: LoRA and QLoRA with merging on.

Checks the options; `train_run.py` loads the model and shows progress, and `pitome_vlm.training`
trains.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..common import require
from . import options as o
from .session import is_first_process
from .terminal import quiet
from .train_run import check_data, load_trainable, show, train_model

_DATA = "Data"
_LORA = "Adapter"
_TRAINING = "Training"

Data = Annotated[
    str,
    typer.Option(
        metavar="FILE",
        help="Training data: JSON or JSONL file in LLaVA's format, or a Hugging Face dataset with "
        "images and messages.",
        rich_help_panel=_DATA,
    ),
]
Output = Annotated[
    Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the adapter.")
]
ImageFolder = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Folder that image paths in the data are relative to; default: the data's folder.",
        rich_help_panel=_DATA,
    ),
]
Split = Annotated[
    str,
    typer.Option(
        metavar="NAME", help="Split of a Hugging Face dataset to train on.", rich_help_panel=_DATA
    ),
]
ValData = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Held-out data to measure accuracy on before and after training.",
        rich_help_panel=_DATA,
    ),
]
ValFraction = Annotated[
    float | None,
    typer.Option(
        metavar="F",
        help="Fraction of the data to hold out, in place of --val-data.",
        rich_help_panel=_DATA,
    ),
]
TextOnly = Annotated[
    bool,
    typer.Option(
        "--text-only", help="Accept conversations without an image.", rich_help_panel=_DATA
    ),
]
MaxLength = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Longest conversation in tokens, counted before merging; default: the model's limit.",
        rich_help_panel=_DATA,
    ),
]
Budgets = Annotated[
    str | None,
    typer.Option(
        metavar="N,N",
        help="Budgets (token counts or fractions) to draw from at every step, so that one adapter "
        "works at all of them.",
        rich_help_panel=_TRAINING,
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        metavar="PATH",
        help="Base model of the adapter given as --model, if it is no longer where it was.",
        rich_help_panel="Loading",
    ),
]
Rank = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="LoRA rank; default: 32.", rich_help_panel=_LORA),
]
Alpha = Annotated[
    float | None,
    typer.Option(
        metavar="A",
        help="LoRA alpha (updates are scaled by alpha / rank); default: 64.",
        rich_help_panel=_LORA,
    ),
]
Dropout = Annotated[
    float | None,
    typer.Option(metavar="F", help="LoRA dropout; default: 0.", rich_help_panel=_LORA),
]
Projector = Annotated[
    bool, typer.Option("--projector", help="Also adapt the projector.", rich_help_panel=_LORA)
]
Tower = Annotated[
    bool, typer.Option("--vision-tower", help="Also adapt the vision tower.", rich_help_panel=_LORA)
]
Epochs = Annotated[
    float | None,
    typer.Option(metavar="N", help="Passes over the data; default: 1.", rich_help_panel=_TRAINING),
]
Steps = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Optimiser steps, in place of --epochs.",
        rich_help_panel=_TRAINING,
    ),
]
BatchSize = Annotated[
    int,
    typer.Option(
        min=1, metavar="N", help="Conversations per batch and device.", rich_help_panel=_TRAINING
    ),
]
Accumulate = Annotated[
    int,
    typer.Option(min=1, metavar="N", help="Batches per optimiser step.", rich_help_panel=_TRAINING),
]
Rate = Annotated[
    float,
    typer.Option(
        "--learning-rate",
        "--lr",
        metavar="F",
        help="Peak learning rate.",
        rich_help_panel=_TRAINING,
    ),
]
Checkpointing = Annotated[
    bool,
    typer.Option(
        "--gradient-checkpointing",
        help="Recompute activations in the backward pass: less memory, more time.",
        rich_help_panel=_TRAINING,
    ),
]
Seed = Annotated[
    int, typer.Option(min=0, metavar="N", help="Random seed.", rich_help_panel=_TRAINING)
]
ReportTo = Annotated[
    str,
    typer.Option(
        metavar="NAME,NAME",
        help="Where to log the training: wandb, tensorboard, ... or none.",
        rich_help_panel=_TRAINING,
    ),
]
TrainingArgs = Annotated[
    str,
    typer.Option(
        metavar="K=V,K=V",
        help="Other fields of transformers' TrainingArguments, for instance "
        "bf16=False,eval_steps=50.",
        rich_help_panel=_TRAINING,
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
    keep: o.Keep = None,
    tokens: o.Tokens = None,
    ratio: o.Ratio = None,
    algorithm: o.Algorithm = None,
    preset: o.Preset = None,
    option: o.MergeOption = None,
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
    load_4bit: o.Load4Bit = False,
    load_8bit: o.Load8Bit = False,
    dtype: o.Dtype = None,
    device: o.Device = None,
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
    merging = o.merge_options(keep, tokens, ratio, algorithm, preset, option=option)
    more = [*(["projector"] * projector), *(["vision_tower"] * vision_tower)]
    lora = {
        "rank": rank,
        "alpha": alpha,
        "dropout": dropout,
        "parts": ("language_model", *more) if more else None,
    }
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
            lambda: load_trainable(
                model, merging, load_4bit, load_8bit, dtype=dtype, device=device, base=base
            ),
            output,
            data=data,
            val_data=val_data,
            val_fraction=val_fraction,
            opening=opening,
            lora={name: value for name, value in lora.items() if value is not None},
            resume=resume,
            overwrite=overwrite,
            rest=rest,
        )
    if is_first_process():
        show(result)


def _budgets(text: str | None) -> list[float]:
    """Token counts as whole numbers, fractions as they are."""
    if text is None:
        return []
    numbers = o.fractions("budgets", text)
    return [int(n) if n.is_integer() and n > 1 else n for n in numbers]
