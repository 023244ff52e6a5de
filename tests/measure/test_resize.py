"""Smaller images as a baseline: counts, pixels, the tower as it was afterwards."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import pitome_vlm
from pitome_vlm import MergeConfig
from pitome_vlm.demo import load_split, scene_image
from pitome_vlm.measure import asking, resize
from pitome_vlm.measure.demo_benchmark import Setting, run


@pytest.fixture(scope="module")
def demo():
    return pitome_vlm.load("demo")


def inputs(processor, images, *questions):
    texts = [asking.question_prompt(processor, question) for question in questions]
    return asking.encoded(processor, texts, images)


def test_a_grid_is_the_smallest_that_is_nearly_square():
    full = (12, 12)
    for tokens in range(1, 145):
        rows, columns = resize.grid_for(tokens, full)
        assert tokens <= rows * columns <= 144
        assert max(rows, columns) <= 1.5 * min(rows, columns)
        smaller = [
            r * c
            for r in range(1, 13)
            for c in range(1, 13)
            if tokens <= r * c < rows * columns and max(r, c) <= 1.5 * min(r, c)
        ]
        assert not smaller
    assert [resize.grid_for(n, full) for n in (9, 36, 144)] == [(3, 3), (6, 6), (12, 12)]
    with pytest.raises(ValueError, match="tokens must be at most 144, got 145"):
        resize.grid_for(145, full)


def test_shrunk_inputs_are_those_of_a_processor_for_smaller_images(demo):
    model, processor = demo
    # One colour per image: however it is scaled, its pixels are known.
    colours = [(200, 40, 90), (10, 220, 130)]
    images = [Image.new("RGB", (192, 192), colour) for colour in colours]
    batch = inputs(processor, images, "What colour is the square?", "Count the rings?")
    smaller, count = resize.shrunk(model, batch, 18)
    assert count == 20
    assert smaller["pixel_values"].shape == (2, 3, 40, 50)
    for row, colour in enumerate(colours):
        expected = torch.tensor(colour).float().div(255).sub(0.5).div(0.5)
        found = smaller["pixel_values"][row].flatten(1)
        torch.testing.assert_close(found, expected[:, None].expand_as(found), atol=1e-5, rtol=0)
    token = model.config.image_token_id
    assert (smaller["input_ids"] == token).sum(-1).tolist() == [20, 20]
    for row in range(2):
        old, new = batch["input_ids"][row], smaller["input_ids"][row]
        assert torch.equal(old[old != token], new[new != token])
    assert smaller["attention_mask"].shape == smaller["input_ids"].shape


def test_the_tower_is_as_before_and_a_whole_grid_changes_nothing(demo):
    model, processor = demo
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (192, 192, 3), np.uint8))
    batch = inputs(processor, [image], "What colour is the circle?")
    with torch.no_grad():
        before = model(**batch).logits
        same, count = resize.shrunk(model, batch, 144)
        with resize.any_image_size(model):
            assert count == 144
            assert torch.equal(model(**same).logits, before)
            small, _ = resize.shrunk(model, batch, 36)
            assert model(**small).logits.shape[1] == before.shape[1] - 144 + 36
        assert torch.equal(model(**batch).logits, before)
        with pytest.raises(ValueError, match="size"):
            model(**small)


def test_what_cannot_be_scaled_is_refused_by_name(demo):
    model, processor = demo
    batch = inputs(processor, [scene_image(0, "val")], "How many rings are there?")
    two = dict(batch) | {"pixel_values": batch["pixel_values"].repeat(2, 1, 1, 1)}
    with pytest.raises(ValueError, match=r"one image per row, got \[2, 3, 120, 120\] for 1 rows"):
        resize.shrunk(model, two, 36)


def test_the_benchmark_asks_it_like_any_other(demo):
    samples = load_split("val", 24)
    whole = Setting("whole", MergeConfig(keep=1.0, algorithm="none"))
    small = Setting("small", whole.config, resize=36)
    outcomes = run(*demo, [whole, small, whole], samples, split="val", batch_size=12)
    assert [outcome.tokens for outcome in outcomes] == [144, 36, 144]
    assert outcomes[0].answers == outcomes[2].answers
    assert outcomes[1].accuracy < outcomes[0].accuracy
    assert small.budget == 36
