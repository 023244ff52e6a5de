"""The LLaVA on a real tower: its scenes and questions, its parts put together, its page."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import Dinov2Config, Dinov2Model

import pitome_vlm
from pitome_vlm.demo.questions import NUMBER_WORDS
from pitome_vlm.measure import resize
from pitome_vlm.measure.demo_benchmark import Outcome, Setting
from pitome_vlm.wrapping.encode import encode_images
from scripts.demo.report import rows_of
from scripts.encoders import (
    llava_data,
    llava_layers,
    llava_measure,
    llava_model,
    llava_questions,
    llava_report,
)
from scripts.encoders.llava_scenes import (
    KINDS,
    NAMES,
    SIZE,
    SPLIT_SCENES,
    Library,
    composition,
    draw,
    scene,
)
from scripts.encoders.real_llava import TRAINED


@pytest.fixture(scope="module")
def found() -> Library:
    """Emoji that are discs of one colour each, and digits that are white."""
    disc = np.hypot(*np.mgrid[-31.5:32, -31.5:32]) < 31
    emoji = {}
    for style in (0, 1):
        for number, name in enumerate(NAMES):
            drawn = np.zeros((64, 64, 4), np.uint8)
            drawn[disc] = (number, 100 * style, 50, 255)
            emoji[style, name] = Image.fromarray(drawn)
    digit = Image.new("L", (28, 28), "white")
    photo = Image.effect_noise((300, 260), 60).convert("RGB")
    return Library(emoji, [digit] * 500, tuple(i % 10 for i in range(500)), [photo])


def scenes(found, split, count=40):
    return [scene(number, split, found) for number in range(count)]


def test_a_scene_is_a_function_of_its_split_and_number(found):
    for split in SPLIT_SCENES:
        one, other = scenes(found, split, 4), scenes(found, split, 4)
        assert one == other
        assert np.array_equal(draw(one[3], found)[0], draw(other[3], found)[0])
        assert [described.kind for described in one] == list(KINDS)


def test_splits_share_names_but_no_composition_and_no_written_digit(found):
    held = {split: scenes(found, split, 120) for split in SPLIT_SCENES}
    hashes = {split: {composition(one) for one in own} for split, own in held.items()}
    written = {
        split: {thing.style for one in own for thing in one.things if thing.digit is not None}
        for split, own in held.items()
    }
    for some in (hashes, written):
        assert all(some.values())
        assert sum(map(len, some.values())) == len(set().union(*some.values()))
    names = {thing.name for one in held["test"] for thing in one.things if thing.digit is None}
    assert names <= set(NAMES)
    assert len(names) > 60
    moved = dataclasses.replace(held["val"][1], photo=None, things=held["val"][1].things[::-1])
    assert composition(moved) == composition(held["val"][1])


def test_things_are_apart_and_where_the_map_says(found):
    for described in scenes(found, "train"):
        image, seen = draw(described, found)
        assert image.size == seen.shape == (SIZE, SIZE)
        assert set(np.unique(seen)) == set(range(len(described.things) + 1))
        for number, thing in enumerate(described.things, start=1):
            rows, columns = np.nonzero(seen == number)
            assert abs(rows.mean() - thing.y) < 2
            assert abs(columns.mean() - thing.x) < 2
            share = 1 if thing.digit is not None else np.pi / 4
            assert len(rows) == pytest.approx(share * thing.side**2, rel=0.1)


def answer(described, words):
    """Worked out from the words of a question and what is in the image alone."""
    names = Counter(thing.name for thing in described.things)
    by_name = {thing.name: thing for thing in described.things}
    asked = [word for word in words if word in NAMES]

    def place(thing):
        half = SIZE // 2
        return f"{'bottom' if thing.y > half else 'top'}-{'right' if thing.x > half else 'left'}"

    if words[:2] == ["how", "many"]:
        return NUMBER_WORDS[names[asked[0]] if asked else len(described.things)]
    if words[0] == "where":
        return place(by_name[asked[0]])
    if words[:2] == ["is", "there"]:
        return "yes" if names[asked[0]] else "no"
    if words[0] == "which":
        return max(asked, key=lambda name: by_name[name].side)
    if words[1] == "number":
        return NUMBER_WORDS[next(t.digit for t in described.things if t.digit is not None)]
    alone = words[2] == "shown"
    there = [t for t in described.things if alone or place(t) == words[4]]
    assert len(there) == 1
    return there[0].name


def test_answers_are_right_and_short(found):
    words, kinds = llava_model.WORLD.words, Counter()
    for split in SPLIT_SCENES:
        counts: Counter = Counter()
        for number in range(40):
            described, asked = llava_questions.questions(number, split, 10, found, counts)
            assert len(asked) >= llava_questions.PER_SCENE
            for question in asked:
                assert question.answer == answer(described, question.text.split()), question
                assert question.answer in words
                kinds[question.type] += 1
    assert set(kinds) == set(llava_questions.TYPES)
    samples = llava_questions.load_split("test", found, 50)
    assert len(samples) == 50 * llava_questions.PER_SCENE
    parts = llava_measure.in_parts(samples)
    assert Counter(one for part in parts for one in part) == Counter(samples)
    # The images of a batch are those of the one before it.
    together = [sample.scene_id for sample in parts[0]]
    assert together[:40] == together[40:80] == list(range(40))


def test_arrays_say_what_patches_show(found, tmp_path: Path):
    llava_data.build("val", 6, found, tmp_path)
    arrays = llava_data.Arrays.load(tmp_path)
    for number, described in enumerate(scenes(found, "val", 6)):
        named = llava_model.WORLD.shown(torch.from_numpy(arrays.objects[number]).long()[:1])
        shown = [llava_model.WORLD.shown_words[i] for i in named[0].nonzero().flatten()]
        thing = described.things[0]
        name = thing.name if thing.digit is None else NUMBER_WORDS[thing.digit]
        assert shown == [name, thing.size]
        patches = arrays.patch_object[number].reshape(16, 16)
        assert patches[thing.y // 14, thing.x // 14] == 0


def test_parts_are_put_together_around_a_tower_that_sees_larger_images(tmp_path: Path):
    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    torch.manual_seed(0)
    tower = Dinov2Model(Dinov2Config(**sizes, image_size=518, patch_size=14)).eval()
    trained = llava_model.build(Dinov2Config(**sizes))
    llava_model.save_trained(trained, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert not any("vision_tower" in name for name in state)
    model = llava_model.build(Dinov2Config(**sizes)).eval()
    llava_model.join(model, tower, state)
    pixels = torch.randn(1, 3, SIZE, SIZE)
    with torch.no_grad():
        own = tower(pixels, output_hidden_states=True).hidden_states[-2]
        read = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
        assert torch.allclose(own, read, atol=1e-5)
        ids = torch.tensor([[1, *[4] * 256, 7]])
        batch = {"input_ids": ids, "attention_mask": ids.ne(0), "pixel_values": pixels}
        smaller, count = resize.shrunk(model, batch, 64)
        with resize.any_image_size(model):
            assert model(**smaller).logits.shape[1] == count + 2 == 66
        merged = encode_images(pitome_vlm.wrap(model, tokens=16), pixels)
    assert (merged.full_counts, merged.counts) == ([256], [16])
    with pytest.raises(ValueError, match="weights do not fit: missing"):
        llava_model.join(llava_model.build(Dinov2Config(**sizes)), tower, {})


def test_the_page_says_what_is_missing_and_compares_with_the_demo(found):
    samples = llava_questions.load_split("test", found, 8)
    draws = np.random.default_rng(0)

    def row(setting: Setting, share: float) -> Outcome:
        right = draws.random(len(samples)) < share
        given = [s.answer if r else "" for s, r in zip(samples, right, strict=True)]
        return Outcome(setting, setting.budget or 256, given, right)

    every = llava_measure.every_row()
    assert len({(one.name, one.budget) for one in every}) == len(every)
    rows = rows_of([row(one, 0.9 if one.budget is None else 0.7) for one in every[:-3]])
    demo = rows_of([row(every[0], 0.9)])
    facts = {"split": "test", "command": "this test"}
    page = llava_report.report(samples, rows, demo, facts, "Trained.")
    assert f"**3 of {len(every) - 1} rows are not measured yet.**" in page
    for part in (
        "## Calibration",
        "## Do the demo's rankings hold?",
        "one maintainer",
        "VisPruner",
    ):
        assert part in page


# PyTorch loads what it knows of the meta device.
@pytest.mark.slow
def test_other_merging_layers_are_compared_with_the_default_and_their_costs_named(found):
    samples = llava_questions.load_split("val", found, 8)
    every = llava_layers.every_row()
    assert len({(one.name, one.budget) for one in every}) == len(every)
    right = np.arange(len(samples)) % 4 > 0
    few = [every[0], every[-1 - len(llava_layers.LAYERS)], every[-1]]
    given = [s.answer if r else "" for s, r in zip(samples, right, strict=True)]
    rows = [Outcome(one, one.budget or 256, given, right) for one in few]
    rows[2] = dataclasses.replace(rows[2], correct=np.ones_like(right))
    tower = Dinov2Config(num_hidden_layers=12, hidden_size=24, num_attention_heads=1)
    costs = llava_layers.counted(llava_model.build(tower).eval(), few)
    assert [one["layers"] for one in costs] == [[], [4, 6], [5]]
    assert costs[0]["tower"] < min(costs[1]["tower"], costs[2]["tower"])
    assert costs[0]["flops"] > costs[2]["flops"] > costs[1]["flops"]
    facts = {"split": "val", "command": "this test"}
    page = llava_layers.report(samples, rows_of(rows), costs, facts)
    assert f"| 256 | none |  | 75.0 |  | 100 | {costs[0]['tower']} (1.00) |" in page
    assert "| 16 | pitome_plus (default) | 4, 6 | 75.0 |  |" in page
    assert "| 16 | 5 alone | 5 | 100.0 | +25.0 (" in page


def test_the_weights_in_the_repository_are_those_of_the_model_without_its_tower():
    with torch.device("meta"):
        state = llava_model.build().state_dict()
    expected = {
        name: tuple(value.shape)
        for name, value in state.items()
        if not name.startswith(llava_model.TOWER)
    }
    path = Path(__file__).resolve().parents[2] / TRAINED / "model.safetensors"
    stored = load_file(path)
    assert {name: tuple(value.shape) for name, value in stored.items()} == expected
    assert path.stat().st_size < 8e6
