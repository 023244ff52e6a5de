"""A transformers `Trainer` for wrapped models, and callbacks for other Trainers.

It only changes the places where a Trainer assumes that logits have the length of the labels. DDP,
FSDP, DeepSpeed, mixed precision, logging and resuming are the Trainer's own.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from transformers import ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_pt_utils import LabelSmoother

from ..merge.config import MergeConfig
from ..releases import CACHE_NAME
from ..wrapping.columns import IGNORED_LABEL
from ..wrapping.encode import compact_inputs, planned_schedule
from ..wrapping.wrap import is_wrapped, merge_config, wrap, wrapped
from .metrics import answer_metrics, most_likely
from .shorten import can_shorten, shorten

# Outputs of LLaVA besides the logits; gathered over an evaluation they would fill the memory.
NOT_GATHERED = [
    CACHE_NAME,
    "hidden_states",
    "attentions",
    "image_hidden_states",
    "image_outputs",
]


class MergingTrainer(Trainer):
    """`Trainer` with shortened batches, and optionally a random budget at every step.

    Labels and logits have the same length, so label smoothing, `compute_metrics`, `predict` and
    custom losses work as without merging. Evaluation always uses the model's own budget.
    """

    def __init__(self, *args: Any, budgets: Sequence[float] = (), **kwargs: Any) -> None:
        """Make a Trainer.

        Args:
            *args: of `Trainer`.
            budgets: at every optimiser step, one of them is drawn by seed and step, the same in
                all processes. Whole numbers are tokens per image, others are fractions to keep.
                Empty for the model's own budget.
            **kwargs: of `Trainer`; metrics are those of `answer_metrics` unless given.

        Raises:
            ValueError: the model is not wrapped, or a budget does not fit it.
        """
        kwargs.setdefault("compute_metrics", answer_metrics)
        kwargs.setdefault("preprocess_logits_for_metrics", most_likely)
        super().__init__(*args, **kwargs)
        config = merge_config(self.model)
        self._rows = torch.zeros(2, dtype=torch.long)
        self.budgets = tuple(with_budget(config, budget) for budget in budgets)
        for one in self.budgets:
            planned_schedule(self.model, one)
        if self.args.label_smoothing_factor:
            self.label_smoother: Any = ShiftedLabelSmoother(
                epsilon=self.args.label_smoothing_factor
            )

    def rows_without_answer(self) -> tuple[int, int]:
        """Rows trained on that had no labels, and all rows trained on, over all processes."""
        counts = self.accelerator.reduce(self._rows.to(self.args.device), "sum").tolist()
        return counts[0], counts[1]

    def step_config(self, step: int) -> MergeConfig | None:
        """The merge settings of an optimiser step; None for the model's own."""
        if not self.budgets:
            return None
        return random.Random(f"pitome-vlm/{self.args.seed}/{step}").choice(self.budgets)

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One forward and backward pass, under the budget of this step."""
        labels = inputs.get("labels")
        if labels is not None:
            # Added up where the labels are, so that no step waits for an accelerator.
            self._rows = self._rows.to(labels.device)
            self._rows[0] += (labels == IGNORED_LABEL).all(1).sum()
            self._rows[1] += len(labels)
        config = self.step_config(self.state.global_step)
        if config is None:
            loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)
            return loss
        with wrapped(self.model, config=config):
            loss = super().training_step(model, inputs, *args, **kwargs)
        return loss

    def prediction_step(
        self,
        model: Any,
        inputs: Any,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        """Like `Trainer`, but only the logits are gathered."""
        ignored = [*NOT_GATHERED, *(ignore_keys or ())]
        return super().prediction_step(model, inputs, prediction_loss_only, ignored)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The adapter's own card instead of the Trainer's."""
        if not hasattr(type(self.model), "peft_config"):
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            self.model.create_or_update_model_card(self.args.output_dir)

    def _prepare_inputs(self, inputs: Any) -> dict[str, Any]:
        batch = super()._prepare_inputs(inputs)
        compared = self.args.label_smoothing_factor or not self.model.training
        if compared and not can_shorten(self.model):
            return compact_inputs(self.model, **batch)
        return shorten(self.model, batch)


class ShiftedLabelSmoother(LabelSmoother):
    """Label smoothing that compares a position with the next token.

    The Trainer shifts by the name of the model's class, and LLaVA's is not on its list.
    """

    def __call__(
        self, model_output: Any, labels: torch.Tensor, shift_labels: bool = True, **kwargs: Any
    ) -> Any:
        """The smoothed loss."""
        del shift_labels
        return super().__call__(model_output, labels, shift_labels=True, **kwargs)


class KeepMerging(TrainerCallback):
    """For other Trainers, such as TRL's: the adapters they save carry the merge settings.

    Needed if the model is wrapped first and the Trainer applies PEFT to it.
    """

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Wrap the `PeftModel`, which then saves the settings with the adapter."""
        del args, state, control, kwargs
        if model is not None and is_wrapped(model):
            wrap(model, config=merge_config(model))


class ProgressLine(ProgressCallback):
    """The Trainer's progress bar with the loss in it, instead of a printed line per log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the newest loss."""
        del args, control, kwargs
        bar = self.training_bar
        if state.is_world_process_zero and bar is not None and logs and "loss" in logs:
            bar.set_postfix(loss=f"{float(logs['loss']):.3f}")

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        """Label the second bar, and remove it afterwards."""
        super().on_prediction_step(*args, **kwargs)
        if self.prediction_bar is not None:
            self.prediction_bar.leave = False
            self.prediction_bar.set_description("evaluating", refresh=False)


def with_budget(config: MergeConfig, budget: float) -> MergeConfig:
    """The same settings with another budget: a whole number of tokens per image, or a fraction.

    Raises:
        ValueError: out of range.
    """
    if isinstance(budget, int) and not isinstance(budget, bool):
        return config.replace(tokens=budget)
    return config.replace(keep=budget)
