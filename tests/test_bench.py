"""The benchmark's arithmetic, its command, and the gate that merging saves time at all."""

from __future__ import annotations

import json
import statistics
import time

import pytest
import torch
from tiny import tiny_model

import pitome_vlm
from pitome_vlm.bench import Budget, Case, Phases, Report, build, measure
from pitome_vlm.bench.flops import counted_over_formula
from pitome_vlm.bench.report import break_even
from pitome_vlm.config import MergeConfig
from pitome_vlm.costs import costs

# Wrapped at keep=0.25 against unwrapped, the median of ratios of neighbouring runs. FLOPs say
# 0.50 and a quiet machine 0.50; 0.75 leaves room for a noisy one and none for no speed-up.
LARGEST_RATIO = 0.75


def phases(first, decode, steps=10):
    model = tiny_model()
    times = {"first": [first], "answer": [first + decode * (steps - 1)], "encode": [first / 2]}
    return Phases(Budget("x"), Case(answer_tokens=steps), 144, costs(model), **times)


def test_break_even_is_where_a_tenth_is_saved():
    base, merged = phases(100.0, 10.0), phases(50.0, 10.0)
    length = break_even(base, merged)
    assert merged.total_ms(length) == pytest.approx(0.9 * base.total_ms(length))
    assert break_even(base, phases(99.0, 10.0)) == 0
    assert break_even(base, phases(50.0, 8.0)) is None


@pytest.mark.parametrize("algorithm", ["pitome", "pitome_plus", "visionzip"])
def test_formula_and_counter_agree(algorithm):
    budget = Budget("x", MergeConfig(keep=0.25, algorithm=algorithm))
    assert counted_over_formula(build("tiny"), budget) == pytest.approx(1, abs=0.01)


def test_budgets_take_turns_and_the_model_is_left_unwrapped():
    model = build("tiny")
    budgets = [Budget("none"), Budget("quarter", MergeConfig(keep=0.25))]
    found = measure(model, budgets, Case(2, 8, 3), repeats=2, warmup=0)
    assert not pitome_vlm.wrapper.is_wrapped(model)
    assert [one.tokens for one in found] == [144, 36]
    assert all(len(one.first) == len(one.encode) == 2 for one in found)
    assert found[0].merge == [0.0, 0.0]
    assert min(found[1].merge) > 0
    rows = Report("tiny", [found]).rows()
    assert [row[0] for row in rows] == ["none", "quarter"]


def test_command_writes_json_and_names_wrong_options(tmp_path, capsys):
    target = tmp_path / "new" / "b.json"
    words = ["--config", "tiny", "--repeats", "1", "--warmup", "0", "--keep", "0.5"]
    with pytest.raises(SystemExit) as done:
        main_of(["bench", *words, "--answer-tokens", "2", "--json", str(target)])
    assert done.value.code == 0
    assert "pitome_plus keep=0.5" in capsys.readouterr().out
    written = json.loads(target.read_text())
    assert [row["visual_tokens"] for row in written["results"]] == [144, 72]
    for wrong, message in {
        ("--config", "llava-1.5-7"): "unknown shape",
        ("--config", "tiny", "--keep", "x"): "--keep takes numbers",
        ("--config", "tiny", "--model", "demo"): "give one of",
    }.items():
        with pytest.raises(SystemExit) as done:
            main_of(["bench", *wrong])
        assert done.value.code == 2
        assert message in capsys.readouterr().err


def main_of(words):
    from pitome_vlm.cli.app import app

    app(words)


@torch.no_grad()
def test_wrapped_tower_is_faster():
    torch.manual_seed(0)
    model = build_wide()
    pixels = torch.randn(1, 3, 336, 336)

    def run():
        start = time.perf_counter()
        model.model.get_image_features(pixel_values=pixels)
        return time.perf_counter() - start

    def run_wrapped():
        with pitome_vlm.wrapped(model, keep=0.25, algorithm="pitome"):
            start = time.perf_counter()
            pitome_vlm.encode_images(model, pixels)
            return time.perf_counter() - start

    run(), run_wrapped()
    ratios = [run_wrapped() / run() for _ in range(5)]
    assert statistics.median(ratios) < LARGEST_RATIO


def build_wide():
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    size = {"num_hidden_layers": 6, "num_attention_heads": 8, "hidden_size": 512}
    vision = CLIPVisionConfig(**size, intermediate_size=2048, image_size=336, patch_size=14)
    text = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=99)
    return LlavaForConditionalGeneration(config).eval()
