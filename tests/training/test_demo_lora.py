"""The scenes that scripts/training/lora.py trains on are in no split, and its table adds up."""

from __future__ import annotations

import json
import random
from collections import Counter

import numpy as np
import pytest

from pitome_vlm import MergeConfig, demo
from pitome_vlm.demo.scenes import layout_hash
from pitome_vlm.training import read_llava
from scripts.training import lora, lora_report


def test_fresh_scenes_share_no_layout_with_held_out_ones():
    fresh = {layout_hash(lora.fresh_scene(number, 0)) for number in range(300)}
    for split in ("val", "test"):
        assert not fresh & {layout_hash(demo.scene(i, split)) for i in range(400)}
    assert lora.fresh_scene(3, 0) == lora.fresh_scene(3, 0)
    assert lora.fresh_scene(3, 0) != lora.fresh_scene(3, 1)


def test_data_are_in_llava_s_format(tmp_path):
    file = lora.draw_data(tmp_path, 12, 3, seed=0)
    data = read_llava(file)
    assert len(data) == 12
    assert data[0].images[0].size == (192, 192)
    turns = Counter(len(conversation.messages) for conversation in data.conversations)
    assert max(turns) == 6
    assert lora.draw_data(tmp_path, 12, 3, seed=0) == file


def test_questions_are_spread_over_types():
    asked = Counter()
    for number in range(60):
        scene = lora.fresh_scene(number, 0)
        questions = lora.ask_about(scene, random.Random(number), 4, asked)
        assert len({question.text for question in questions}) == len(questions)
    counts = [asked[name] for name in lora.QUESTION_TYPES]
    assert min(counts) > 0.5 * np.mean(counts)


def outcome(config, answers):
    return {"config": config.to_dict(), "tokens": 16, "accuracy": 0.0, "answers": answers}


def test_the_table_compares_with_the_same_base(tmp_path):
    samples = demo.load_split("val", 20)
    truth = [sample.answer for sample in samples]

    def answers(right):
        # Spread over the images, so that a loss shows in all of them.
        wrong = {round(place * 20 / (20 - right)) for place in range(20 - right)}
        return ["wrong" if index in wrong else answer for index, answer in enumerate(truth)]

    def trial(name, bits, trained, *outcomes):
        return {
            "trial": name,
            "bits": bits,
            "trained": trained and trained.to_dict(),
            "seconds": 1,
            "adapter_bytes": 2048,
            "weights": {"language_model": 1024},
            "facts": {"split": "val"},
            "outcomes": list(outcomes),
        }

    paper, none = lora.PAPER, lora.NONE
    results = [
        trial("base", "", None, outcome(none, answers(20)), outcome(paper, answers(10))),
        trial("lora", "", paper, outcome(paper, answers(18))),
        trial("base-nf4", "nf4", None, outcome(none, answers(18)), outcome(paper, answers(8))),
        trial("qlora-nf4", "nf4", paper, outcome(paper, answers(13))),
    ]
    recipe = {"scenes": 32, "per_scene": 4, "epochs": 1, "batch_size": 16}
    recipe |= {"learning_rate": 1e-3, "rank": 8, "seed": 0}
    lora_report.write_report(tmp_path, samples, results, recipe)
    lines = (tmp_path / "report.md").read_text().splitlines()
    plain = next(line for line in lines if "LoRA, merging on" in line)
    assert "| 90.0 |" in plain
    assert "| +40.0 |" in plain
    assert plain.endswith("| 80 % |")
    qlora = next(line for line in lines if "QLoRA" in line and line.startswith("| 16"))
    assert qlora.endswith("| 50 % |")
    assert json.loads((tmp_path / "results.json").read_text())["recipe"] == recipe
    results[0]["outcomes"][1] = outcome(paper, answers(19))  # a loss that may be chance
    lora_report.write_report(tmp_path, samples, results, recipe)
    lines = (tmp_path / "report.md").read_text().splitlines()
    assert next(line for line in lines if "LoRA, merging on" in line).endswith("|  |")


@pytest.mark.parametrize("trial", lora.TRIALS, ids=lambda trial: trial.name)
def test_trials_train_and_ask_at_the_same_budget(trial):
    for config in (*trial.asked, trial.trained):
        if isinstance(config, MergeConfig) and config.algorithm != "none":
            assert config.tokens == 16
