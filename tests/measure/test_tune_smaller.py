"""`tune` against smaller images of as many tokens: which is better, and where none can be had."""

from __future__ import annotations

import dataclasses

import checkpoint_families
import numpy as np
import pytest
import tiny_families
import torch
import transformers
from PIL import Image
from tuning import RECIPES, by_tokens, split_of, stub_rows, tuned

import pitome_vlm
from pitome_vlm.demo import load_split, scene_image
from pitome_vlm.measure import asking, resize
from pitome_vlm.measure.stats import difference_interval
from pitome_vlm.measure.tune import Plan, Recipe, Row, exact_match, tune
from pitome_vlm.measure.tune.split import split_by_image
from pitome_vlm.wrapping.wrap import merge_config

PLAN = Plan(recipes=RECIPES[:1], budgets=[36], max_loss=0.3)
ONE = [Recipe("tome", {"algorithm": "tome"})]


def test_the_better_of_the_two_is_named_by_a_paired_interval_over_images():
    better = {}
    for lost, smaller in ((0.0, 0.2), (0.2, 0.0), (0.1, 0.1)):
        asker, result = tuned(by_tokens(pitome={36: lost}), plan=PLAN, smaller=smaller)
        found = result.smaller
        rows, _ = given = stub_rows()
        check = split_of(given).check
        right, other = (
            [float(asker.difficulty[row] >= share) for row in check] for share in (lost, smaller)
        )
        images = [rows[row].images for row in check]
        assert (found.low, found.high) == difference_interval(right, other, images)
        assert found.difference == pytest.approx(np.mean(right) - np.mean(other))
        better[lost, smaller] = found.better
        assert result.against_smaller in result.report()
        assert result.to_dict()["smaller"] == dataclasses.asdict(found)
    assert list(better.values()) == ["merging", "smaller", "not_shown"]


def test_the_line_says_what_is_compared_which_is_better_and_how_fast():
    _, result = tuned(by_tokens(pitome={36: 0.0}), plan=PLAN, smaller=0.2)
    line = result.against_smaller
    assert line.startswith(
        "Against images scaled down (36 tokens per image, merged 36), merging answers "
    )
    assert "points more right (95 % interval +" in line
    assert "merging is better for this data." in line
    assert line.endswith(
        "First token of one question: 12.5 ms merged, 9.0 ms with the smaller image."
    )
    _, result = tuned(
        by_tokens(pitome={36: 0.2}), plan=PLAN, smaller=0.0, rows=stub_rows(answers=())
    )
    assert "points fewer as the unreduced model does" in result.against_smaller
    assert "smaller images are better for this data." in result.against_smaller


def test_it_is_asked_once_and_is_no_look_at_the_check_part(tmp_path):
    share = by_tokens(pitome={36: 0.01, 18: 0.02})
    _, first = tuned(share, plan=PLAN, smaller=0.2, folder=tmp_path)
    asker, again = tuned(share, plan=PLAN, smaller=0.2, folder=tmp_path, resume=True)
    assert asker.asked_smaller == 0
    assert again.to_dict() == first.to_dict()
    other = dataclasses.replace(PLAN, budgets=[18])
    _, second = tuned(share, plan=other, smaller=0.2, folder=tmp_path, resume=True)
    assert second.checks[0].loss.level == pytest.approx(1 - 0.05 / 2)


def test_without_a_reduction_there_is_nothing_to_compare_and_a_reason_is_said():
    asker, result = tuned(by_tokens(pitome={36: 0.9}), plan=PLAN, smaller=0.2)
    assert (result.verdict, asker.asked_smaller) == ("unreduced", 0)
    assert (result.smaller, result.against_smaller) == (None, "")
    _, result = tuned(by_tokens(), plan=PLAN)
    assert result.smaller is None
    line = "Not compared with smaller images: the stub has no images."
    assert result.against_smaller == line
    assert line in result.report()


def test_the_bundled_model_sees_its_images_scaled_down_and_is_left_as_it_was():
    model, processor = pitome_vlm.load("demo", keep=0.5, dtype="float32")
    before = merge_config(model)
    samples = load_split("val", 24)[::3]
    rows = [Row((scene_image(s.scene_id, "val"),), s.question, (s.answer,)) for s in samples]
    result = tune(
        model, processor, rows, recipes=ONE, budgets=[36], max_new_tokens=2, max_loss=0.99
    )
    assert merge_config(model) == before
    found = result.smaller
    assert (found.how, found.tokens, found.merged_tokens) == ("images scaled down", 36, 36)
    assert min(found.ms, found.merged_ms) > 0
    pitome_vlm.unwrap(model)
    split = split_by_image([(row.images[0].tobytes().hex()[:4000],) for row in rows], seed=0)
    right, wanted = [], [rows[place].answers[0] for place in split.check]
    for row in (rows[place] for place in split.check):
        text = asking.question_prompt(processor, row.question)
        batch, _ = resize.shrunk(model, asking.encoded(processor, [text], row.images), 36)
        with resize.any_image_size(model):
            right += asking.answers(model, processor, batch, max_new_tokens=2)
    merged = result.checks[0].loss.reduced
    assert found.difference == pytest.approx(merged - np.mean(np.array(right) == wanted))


def lenient(given, answers):
    """Models with random weights agree with themselves about nothing."""
    return 0.5 + 0.5 * exact_match(given, answers)


LENIENT = {"recipes": ONE, "max_new_tokens": 2, "max_loss": 0.6, "scorer": lenient}


def noise_rows(count=8):
    """Questions about images of noise in several sizes."""
    draw = np.random.default_rng(0)
    sizes = [(90, 60), (64, 64), (40, 72)]
    images = [
        Image.fromarray(draw.integers(0, 255, (*sizes[i % 3], 3), np.uint8)) for i in range(count)
    ]
    return [Row((image,), "what shape is it?") for image in images]


def qwen3_processor():
    """Qwen3-VL's processor, not initialised: that takes one for videos, which needs torchvision."""
    made = object.__new__(transformers.Qwen3VLProcessor)
    made.tokenizer = checkpoint_families.tokenizer(image_token="<image>", video_token="<video>")
    made.image_processor = checkpoint_families.images(
        "Qwen2VL",
        size={"shortest_edge": 16 * 16, "longest_edge": 96 * 96},
        patch_size=4,
        merge_size=2,
        temporal_patch_size=2,
    )
    made.video_processor, made.image_token, made.video_token = None, "<image>", "<video>"
    made.chat_template = checkpoint_families.CHAT_TEMPLATE.replace("<image>", "<start><image><end>")
    return made


def test_a_model_of_any_resolution_is_compared_with_max_pixels():
    model, processor = tiny_families.FAMILIES["qwen3_vl"].model().eval(), qwen3_processor()
    rows = noise_rows()
    result = tune(model, processor, rows, budgets=[0.25], batch_size=3, **LENIENT)
    found = result.smaller
    assert found.how.startswith("max_pixels="), result.against_smaller
    value = int(found.how.split("=")[1])
    check = split_by_image([(str(i),) for i in range(len(rows))], seed=0).check

    def prepared(row, most):
        text = asking.question_prompt(processor, row.question)
        size = {"size": {"shortest_edge": min(256, most), "longest_edge": most}}
        return asking.encoded(processor, [text], row.images, image_options=size)

    def mean(most):
        grids = [prepared(rows[place], most)["image_grid_thw"] for place in check]
        return float(np.mean([grid.prod().item() // 4 for grid in grids]))

    assert found.tokens == mean(value)
    assert mean(int(value * 0.98)) < found.merged_tokens <= found.tokens
    with torch.no_grad():
        by_hand = [
            asking.answers(model, processor, prepared(rows[place], value), max_new_tokens=2)
            for place in check
        ]
        plain = [
            asking.answers(model, processor, prepared(rows[place], 96 * 96), max_new_tokens=2)
            for place in check
        ]
    scores = [lenient(*one, other) for one, other in zip(by_hand, plain, strict=True)]
    assert found.difference == pytest.approx(result.checks[0].loss.reduced - np.mean(scores))


def test_models_whose_images_have_one_size_say_so():
    family = tiny_families.FAMILIES["gemma3"].model().eval()
    processor = checkpoint_families.gemma3(family.config)
    result = tune(family, processor, noise_rows(), budgets=[8], **LENIENT)
    assert result.smaller is None
    assert result.against_smaller == (
        "Not compared with smaller images: Gemma3ForConditionalGeneration brings every image, or "
        "every tile of one, to one size, so a scaled image has as many tokens."
    )


def test_a_limit_that_cannot_go_as_low_is_said():
    family = tiny_families.FAMILIES["idefics3"].model().eval()
    processor = checkpoint_families.PROCESSORS["idefics3"](family.config)
    result = tune(family, processor, noise_rows(), budgets=[0.1], **LENIENT)
    assert result.smaller is None
    assert "no smaller image has about" in result.against_smaller
    assert "longest_edge=1 still makes" in result.against_smaller
