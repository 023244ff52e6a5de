"""`pitome-vlm train`: LoRA and QLoRA with merging on.

Knows: its options. Does not know: how a run is carried through (`train_run.py`).
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Annotated, Any

import typer

from ..common import require
from . import options as o
from .eval_run import is_first
from .terminal import quiet
from .train_run import Plan, carry_through, show

_DATA = "Data"
_LORA = "Adapter"
_TRAINING = "Training"

Data = Annotated[
    str,
    typer.Option(
        metavar="FILE",
        help="LLaVA-format JSON or JSONL, or a Hugging Face dataset with images and messages.",
        rich_help_panel=_DATA,
    ),
]
Output = Annotated[
    Path, typer.Option("--output", "-o", metavar="DIR", help="Where the adapter is written.")
]
ImageFolder = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Where the file's pictures are; default: beside it.",
        rich_help_panel=_DATA,
    ),
]
Split = Annotated[str, typer.Option(help="Split of a dataset.", rich_help_panel=_DATA)]
ValData = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", help="Held-out data, for accuracy before and after.", rich_help_panel=_DATA
    ),
]
ValFraction = Annotated[
    float | None,
    typer.Option(
        metavar="F", help="Hold out this share of the data instead.", rich_help_panel=_DATA
    ),
]
TextOnly = Annotated[
    bool,
    typer.Option("--text-only", help="Accept records without a picture.", rich_help_panel=_DATA),
]
MaxLength = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Longest row in tokens before merging; default: the model's.",
        rich_help_panel=_DATA,
    ),
]
Budgets = Annotated[
    str | None,
    typer.Option(
        metavar="N,N",
        help="Draw one of these budgets at every step (tokens, or fractions), so that one adapter "
        "serves all of them.",
        rich_help_panel=_TRAINING,
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        metavar="PATH",
        help="Base model of an adapter that --model names, where it was moved.",
        rich_help_panel="Loading",
    ),
]
Rank = Annotated[
    int | None, typer.Option(min=1, help="Rank of LoRA; default 32.", rich_help_panel=_LORA)
]
Alpha = Annotated[
    float | None,
    typer.Option(help="Scale of LoRA (alpha / rank); default 64.", rich_help_panel=_LORA),
]
Dropout = Annotated[
    float | None, typer.Option(help="Dropout of LoRA; default 0.", rich_help_panel=_LORA)
]
Projector = Annotated[
    bool, typer.Option("--projector", help="Adapt the projector too.", rich_help_panel=_LORA)
]
Tower = Annotated[
    bool, typer.Option("--vision-tower", help="Adapt the vision tower too.", rich_help_panel=_LORA)
]
Epochs = Annotated[
    float | None, typer.Option(help="Passes over the data; default 1.", rich_help_panel=_TRAINING)
]
Steps = Annotated[
    int | None, typer.Option(min=1, help="Steps instead of epochs.", rich_help_panel=_TRAINING)
]
BatchSize = Annotated[
    int, typer.Option(min=1, help="Conversations at a time and device.", rich_help_panel=_TRAINING)
]
Accumulate = Annotated[
    int, typer.Option(min=1, help="Batches per step.", rich_help_panel=_TRAINING)
]
Rate = Annotated[
    float, typer.Option("--learning-rate", "--lr", help="Peak.", rich_help_panel=_TRAINING)
]
Checkpointing = Annotated[
    bool,
    typer.Option(
        "--gradient-checkpointing", help="Less memory, more time.", rich_help_panel=_TRAINING
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Of everything random.", rich_help_panel=_TRAINING)]
ReportTo = Annotated[
    str, typer.Option(metavar="A,B", help="wandb, tensorboard, ...", rich_help_panel=_TRAINING)
]
TrainingArgs = Annotated[
    str,
    typer.Option(
        metavar="K=V,K=V",
        help="Further fields of transformers' TrainingArguments, for instance "
        "bf16=False,eval_strategy=steps,eval_steps=50,push_to_hub=True.",
        rich_help_panel=_TRAINING,
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in the output folder.")]


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
    resume: Resume = False,
    load_4bit: o.Load4Bit = False,
    load_8bit: o.Load8Bit = False,
    dtype: o.Dtype = None,
    device: o.Device = None,
    base: Base = None,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
) -> None:
    """Train a LoRA adapter while tokens are merged; QLoRA with --load-4bit.

    The adapter remembers base model, quantisation and merging: every command and
    `pitome_vlm.load` take its folder as a model. Needs `pip install "pitome-vlm[train]"`.

    Example: `pitome-vlm train --model PATH --data train.jsonl --val-fraction 0.02 --keep 0.25
    --load-4bit -o adapter`
    """
    del debug  # read by the command group
    require("peft", "train", "train")
    merging = o.MergeOptions(keep, tokens, ratio, algorithm, preset).given()
    more = [*(["projector"] * projector), *(["vision_tower"] * vision_tower)]
    parts = ("language_model", *more) if more else None
    plan = Plan(
        loading=o.LoadOptions(model, load_4bit, load_8bit, dtype, device),
        base=base,
        merging=merging,
        output=output,
        data=(data, val_data),
        opening={"image_folder": image_folder, "split": split, "text_only": text_only},
        lora={"rank": rank, "alpha": alpha, "dropout": dropout, "parts": parts},
        resume=resume,
        rest={
            "val_fraction": val_fraction,
            "budgets": _budgets(budgets),
            "max_length": max_length,
            "num_train_epochs": epochs,
            "max_steps": max_steps,
            "per_device_train_batch_size": batch_size,
            "gradient_accumulation_steps": accumulate,
            "learning_rate": learning_rate,
            "gradient_checkpointing": gradient_checkpointing or None,
            "seed": seed,
            "report_to": report_to.split(","),
        }
        | _pairs(training_args),
    )
    with quiet(verbose):
        result = carry_through(plan)
    if is_first():
        show(result)


def _budgets(text: str | None) -> list[float]:
    found: list[float] = []
    for word in [] if text is None else text.split(","):
        try:
            found.append(int(word) if word.strip().isdigit() else float(word))
        except ValueError:
            raise ValueError(
                f"budgets must be numbers separated by commas (tokens, or fractions), got {word!r}"
            ) from None
    return found


def _pairs(text: str) -> dict[str, Any]:
    """`K=V,K=V` with Python values where they are some; true and false in any case."""
    pairs: dict[str, Any] = {}
    for item in filter(None, (piece.strip() for piece in text.split(","))):
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise ValueError(f"training_args must be K=V,K=V, got {item!r}")
        # As a string "false" would count as true.
        value = value.strip()
        value = value.capitalize() if value.lower() in ("true", "false") else value
        try:
            pairs[name.strip()] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            pairs[name.strip()] = value
    return pairs
