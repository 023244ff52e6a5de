"""A sweep without lmms-eval: deterministic answers, as slow as one likes, to be killed."""

from __future__ import annotations

import random
import time
from pathlib import Path

from pitome_vlm.measure.evaluate.records import Folder, Measured, Question
from pitome_vlm.measure.evaluate.suites import cells, grid
from pitome_vlm.measure.evaluate.sweep import pending, run_sweep

TASKS = ("gqa", "counting")
QUESTIONS = 60
RUN = {
    "model": "stand-in",
    "checkpoint": "sha256:0",
    "model_args": {},
    "batch_size": 4,
    "limit": None,
    "gen_kwargs": None,
    "versions": {"pitome-vlm": "0"},
}
FACTS = {
    "text_tokens": 40,
    "tower_flops": 3e11,
    "projector_flops": 1e9,
    "prefill_flops": 8e12,
    "total_flops": 8.3e12,
    "kv_bytes": 3 << 20,
    "kv_bytes_per_image": 2 << 20,
    "hardware": {"hardware": "none", "dtype": "float32"},
}


def wanted():
    return cells(TASKS, grid(["pitome", "tome"], [192, 64]))


def measure(cell) -> Measured:
    rng = random.Random(cell.name)
    tokens = cell.setting.config.tokens or 576
    asked = [Question(i, f"image {i // 2}", "ab"[i % 2], "yes", "0") for i in range(QUESTIONS)]
    scores = [float(rng.random() < 0.5 + tokens / 1500) for _ in asked]
    facts = {**FACTS, "visual_tokens": tokens}
    results = {"exact_match": sum(scores) / len(scores)}
    return Measured(results, asked, ["yes"] * QUESTIONS, scores, 1.5, facts, {"versions": {}})


def sweep(folder: Path, *, resume: bool, evaluate=measure, tell=None):
    place = Folder(folder)
    left = pending(wanted(), place, RUN, resume=resume)
    return run_sweep(wanted(), left, evaluate, place, RUN, tell=tell)


def slow_sweep(folder: Path) -> None:
    """For a process that is to be killed in the middle."""

    def slowly(cell):
        time.sleep(0.2)
        return measure(cell)

    sweep(folder, resume=False, evaluate=slowly)
