"""Accuracy of an exported checkpoint, the way a user runs it.

Knows how to ask a checkpoint the questions of a split through processor and `generate` in
float32, how sure the figures are, and what can be guessed without looking. Leaves
training to `tower.py` and `language.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoProcessor, LlavaForConditionalGeneration

from pitome_vlm.demo.dataset import Sample, load_split, scene_image
from pitome_vlm.demo.processor import vocabulary
from pitome_vlm.demo.questions import QUESTION_TYPES
from pitome_vlm.demo.scenes import KINDS
from pitome_vlm.measure.stats import mean_interval

from .data import Arrays


@dataclass(frozen=True)
class Figure:
    """An accuracy in percent with its 95 % interval and number of questions."""

    name: str
    accuracy: float
    low: float
    high: float
    questions: int


def ask(checkpoint: Path, split: str, limit: int | None = None, batch: int = 48) -> list[str]:
    """The checkpoint's answers to the samples of a split, in their order."""
    processor = AutoProcessor.from_pretrained(checkpoint)
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    samples = load_split(split, limit)
    answers: list[str] = []
    for first in range(0, len(samples), batch):
        part = samples[first : first + batch]
        prompts = [
            processor.apply_chat_template(
                [
                    {
                        "role": "user",
                        "content": [{"type": "image"}, {"type": "text", "text": s.question}],
                    }
                ],
                add_generation_prompt=True,
            )
            for s in part
        ]
        images = [scene_image(s.scene_id, split) for s in part]
        inputs = processor(text=prompts, images=images, return_tensors="pt", padding=True)
        with torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=3)
        new = out[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
    return answers


def figures(samples: Sequence[Sample], answers: Sequence[str]) -> list[Figure]:
    """Accuracy overall, by question type and by scene kind; intervals clustered by image."""
    right = np.array([s.answer == a for s, a in zip(samples, answers, strict=True)], float)
    scene = np.array([s.scene_id for s in samples])
    groups = [("all", np.ones(len(samples), bool))]
    groups += [(t, np.array([s.question_type == t for s in samples])) for t in QUESTION_TYPES]
    groups += [(k, np.array([s.kind == k for s in samples])) for k in KINDS]
    found: list[Figure] = []
    for name, chosen in groups:
        if not chosen.any():
            continue
        percent = 100 * right[chosen]
        low, high = mean_interval(percent, scene[chosen], extremes=(0, 100))
        found.append(Figure(name, float(percent.mean()), low, high, int(chosen.sum())))
    return found


def blind(folder: Path, splits: Sequence[str], epochs: int = 3) -> dict[str, dict[str, float]]:
    """Percent right, by split and type, of a text-only classifier on the training questions."""
    torch.manual_seed(0)
    words = len(vocabulary())
    padding = words + words * words
    model = nn.EmbeddingBag(padding + 1, words, mode="sum", padding_idx=padding)
    nn.init.zeros_(model.weight)
    optimiser = torch.optim.Adagrad(model.parameters(), lr=0.1)
    train = [Arrays.load(folder / "data" / f"train{part}") for part in (0, 1)]
    inputs = [_grams(arrays) for arrays in train]
    for _ in range(epochs):
        for arrays, grams in zip(train, inputs, strict=True):
            answers = torch.from_numpy(arrays.questions[:, 2]).long()
            for rows in torch.randperm(len(grams))[:120_000].split(2048):
                optimiser.zero_grad()
                nn.functional.cross_entropy(model(grams[rows]), answers[rows]).backward()
                optimiser.step()
    return {split: _blind_scores(model, Arrays.load(folder / "data" / split)) for split in splits}


@torch.no_grad()
def _blind_scores(model: nn.Module, held_out: Arrays) -> dict[str, float]:
    right = model(_grams(held_out)).argmax(-1).numpy() == held_out.questions[:, 2]
    result = {"all": 100 * float(right.mean())}
    for index, name in enumerate(QUESTION_TYPES):
        chosen = held_out.questions[:, 3] == index
        if chosen.any():
            result[name] = 100 * float(right[chosen].mean())
    return result


def _grams(arrays: Arrays, longest: int = 24) -> torch.Tensor:
    """Word and word-pair indices of each question, padded."""
    words = len(vocabulary())
    grams = np.full((len(arrays.questions), longest * 2), words + words * words, np.int64)
    for i, (start, length, _, _) in enumerate(arrays.questions):
        ids = arrays.tokens[start : start + length].astype(np.int64)
        grams[i, :length] = ids
        grams[i, longest : longest + length - 1] = words + ids[:-1] * words + ids[1:]
    return torch.from_numpy(grams)
