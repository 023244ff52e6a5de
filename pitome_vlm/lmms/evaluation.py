"""Measure one cell of a sweep with lmms-eval, on a model that is loaded once for all of them."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lmms_eval import utils
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager, get_task_dict

from ..common import suggest
from ..measure.described import Description
from ..measure.description import describe_llava
from ..measure.evaluate.records import Measured
from ..measure.evaluate.suites import BASELINE, Cell, Setting
from ..measure.provenance import provenance
from ..measure.stats import iqr
from ..measure.timing import time_prefill
from ..wrapping.encode import planned_schedule
from . import tasks_path
from .model import PitomeLlava
from .samples import answer_text, input_tokens, question_scores, questions, task_metrics

TIMED_ROUNDS = 20
MOST_TIMED = 8
TEXT_TOKENS = 64


class Evaluator:
    """A loaded model and lmms-eval's tasks."""

    def __init__(
        self,
        model: str,
        output: Path,
        *,
        model_args: Mapping[str, str] | None = None,
        batch_size: int = 1,
        limit: int | None = None,
        gen_kwargs: str | None = None,
        include_path: str | None = None,
    ) -> None:
        """Find the tasks; the model is loaded by `load`.

        Args:
            model: folder or hub name of a LLaVA.
            output: folder where tasks may write their own files.
            model_args: further arguments of the model class, as text.
            batch_size: questions at a time.
            limit: only the first questions of every task; None for all.
            gen_kwargs: lmms-eval generation arguments, None for the tasks' own.
            include_path: a folder with further tasks.
        """
        self.model, self.output = model, output
        self.model_args = dict(model_args or {})
        self.batch_size, self.limit, self.gen_kwargs = batch_size, limit, gen_kwargs
        folders = [str(tasks_path())]
        if include_path is not None:
            folders.append(include_path)
        self.tasks = TaskManager("ERROR", include_path=folders, model_name="pitome_llava")
        self.lm: Any = None

    def check_tasks(self, names: Sequence[str]) -> None:
        """Refuse unknown tasks, and groups, whose parts are cells of their own."""
        known = set(self.tasks.all_subtasks)
        for name in names:
            if name in known:
                continue
            if name in self.tasks.all_tasks:
                raise ValueError(f"tasks: {name} is a group; name the tasks in it")
            raise ValueError(f"tasks: lmms-eval has no {name!r}.{suggest(name, sorted(known))}")

    def load(self, settings: Sequence[Setting]) -> None:
        """Load the model and refuse budgets it cannot have."""
        text = ",".join(f"{key}={value}" for key, value in self.model_args.items())
        # The sweep sets the merging of every cell, whatever a checkpoint's folder recommends.
        self.lm = PitomeLlava(
            pretrained=self.model,
            batch_size=self.batch_size,
            algorithm="none",
            keep=1.0,
            **utils.simple_parse_args_string(text),
        )
        for setting in settings:
            try:
                planned_schedule(self.lm.model, setting.config)
            except ValueError as error:
                raise ValueError(f"{setting.name}: {error}") from error

    @property
    def processes(self) -> int:
        """Number of processes that work together."""
        return int(self.lm.world_size)

    def wait(self) -> None:
        """Wait for all processes."""
        self.lm.accelerator.wait_for_everyone()

    def __call__(self, cell: Cell) -> Measured | None:
        """Measure one cell; None on processes other than the first."""
        self.lm.reconfigure(cell.setting.config)
        results = simple_evaluate(
            model=self.lm,
            tasks=[cell.task],
            batch_size=self.batch_size,
            limit=self.limit,
            gen_kwargs=self.gen_kwargs,
            log_samples=True,
            task_manager=self.tasks,
            verbosity="ERROR",
            cli_args=self._cli_args(),
        )
        if self.lm.rank != 0:
            return None
        samples = ((results or {}).get("samples") or {}).get(cell.task)
        if not samples:
            raise RuntimeError(f"{cell.name}: lmms-eval returned no answers")
        return self._measured(cell, results, samples)

    def time_first_tokens(self, task: str, settings: Sequence[Setting]) -> dict[str, Any]:
        """Time to the first token of every setting on the first questions of a task.

        The settings take turns, so that whatever else the machine does falls on all of them; the
        first round warms up.
        """
        batch = self._first_batch(task)
        times: dict[str, list[float]] = {setting.name: [] for setting in settings}
        for turn in range(1 + TIMED_ROUNDS):
            for setting in settings:
                self.lm.reconfigure(setting.config)
                with torch.inference_mode():
                    run = time_prefill(self.lm.model, batch, repeats=1, warmup=0)
                if turn:
                    times[setting.name].append(run.median_ms)
        return {
            "task": task,
            "batch_size": len(batch["input_ids"]),
            "rounds": TIMED_ROUNDS,
            "milliseconds": {name: _spread(values) for name, values in times.items()},
        }

    def _first_batch(self, task: str) -> dict[str, torch.Tensor]:
        """What the model is given for the first questions, as in an evaluation."""
        made = get_task_dict([task], self.tasks, "chat")[task]
        size = min(self.batch_size, MOST_TIMED)
        made.build_all_requests(limit=size)
        self.lm.task_dict[task] = made.dataset
        inputs: dict[str, torch.Tensor] = self.lm.first_inputs(made.instances[:size])
        return inputs

    def _cli_args(self) -> argparse.Namespace:
        # Without these lmms-eval takes another way through its own code; some tasks write files.
        return argparse.Namespace(
            process_with_media=False,
            reasoning_tags=None,
            output_path=str(self.output / "task_files"),
        )

    def _measured(
        self, cell: Cell, results: dict[str, Any], samples: list[dict[str, Any]]
    ) -> Measured:
        # Several processes hand over their parts one after the other.
        samples = sorted(samples, key=lambda sample: int(sample["doc_id"]))
        metrics = task_metrics(results["results"][cell.task])
        rest = {key: value for key, value in results.items() if key != "samples"}
        return Measured(
            results=metrics,
            questions=questions(samples),
            answers=[answer_text(sample["filtered_resps"]) for sample in samples],
            scores=question_scores(samples, list(metrics)),
            seconds=self.lm.answering_seconds,
            facts=self._facts(cell, samples),
            lmms_eval=rest,
        )

    def _described(self, cell: Cell, text_tokens: int) -> Description:
        # The processor knows the limits on images of any size.
        processor = self.lm.processor
        return describe_llava(
            self.lm.model,
            config=cell.setting.config,
            text_tokens=text_tokens,
            image_processor=processor,
        )

    def _facts(self, cell: Cell, samples: list[dict[str, Any]]) -> dict[str, Any]:
        model, counts = self.lm.model, input_tokens(samples)
        mean = statistics.fmean(counts) if counts else None
        described = self._described(cell, TEXT_TOKENS)
        if mean is not None and described.image_size is None and described.unit == "image":
            # All images have as many tokens, and the rest is text.
            described = self._described(cell, max(0, round(mean - described.tokens_out)))
        costs = described.before if cell.setting.method == BASELINE else described.after
        names = ("tower_flops", "projector_flops", "prefill_flops", "total_flops", "kv_bytes")
        return {
            "visual_tokens": costs.visual_tokens,
            "visual_tokens_unreduced": described.tokens_in,
            # Where tokens depend on the image, costs are those of an image of this size.
            **({"image_size": list(described.image_size)} if described.image_size else {}),
            **({"described": described.unit} if described.unit != "image" else {}),
            "text_tokens": costs.text_tokens,
            "mean_input_tokens": mean,
            **{name: getattr(costs, name) for name in (*names, "kv_bytes_per_image")},
            "hardware": provenance(model, batch_size=self.batch_size, processes=self.processes),
        }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "iqr": iqr(values)}
