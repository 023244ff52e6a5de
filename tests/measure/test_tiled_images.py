"""Models that cut images into tiles in use: processors, accounting, training, lmms-eval, CLI."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoint_anyres import anyres_checkpoint_model, anyres_processor, save_anyres_checkpoint
from PIL import Image
from test_measure import counted
from tiny_anyres import ANYRES_KINDS, SIZES, anyres_batch, anyres_model
from training_data import records, write_lines
from typer.testing import CliRunner

import pitome_vlm
from pitome_vlm.cli import app
from pitome_vlm.demo.processor import IMAGE
from pitome_vlm.lmms.engine import Engine
from pitome_vlm.lmms.requests import Call, Prompt
from pitome_vlm.measure.accounting import costs
from pitome_vlm.measure.description import from_config
from pitome_vlm.measure.visualize import source_map, source_maps
from pitome_vlm.merge.config import MergeConfig
from pitome_vlm.training import Collator, open_conversations, shorten, train
from pitome_vlm.wrapping.encode import planned_count, prompt_images

QUESTION = "user: <image> what colour is the circle ? assistant:"


def noise(height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_anyres_checkpoint(tmp_path_factory.mktemp("next"))


# --- accounting


def test_counts_are_the_processors_for_every_size():
    model, processor = anyres_checkpoint_model(), anyres_processor()
    for height, width in SIZES:
        batch = processor(images=noise(height, width), text=QUESTION, return_tensors="pt")
        written = int((batch["input_ids"] == IMAGE).sum())
        described = pitome_vlm.describe(model, image_size=(height, width))
        assert described.tokens_in == written, (height, width)


@pytest.mark.parametrize("kind", ANYRES_KINDS)
def test_flops_agree_with_torch(kind):
    """At the projector all groups are known beforehand, so the count is exact."""
    model, size = anyres_model(kind), (100, 180)
    batch = anyres_batch(model, rows=((size,),), texts=(5,))
    every = (
        {"keep": 0.25, "stage": "projector"},
        {"keep": 0.25, "algorithm": "pool"},
        {"keep": 0.5, "stage": "projector", "algorithm": "tome"},
        {"keep": 1.0},
    )
    for options in every if kind == "next" else every[:2]:
        with pitome_vlm.wrapped(model, **options):
            cost = costs(model, text_tokens=9, image_size=size)
            found = counted(model, batch)
        computed = (cost.tower_flops, cost.projector_flops, cost.prefill_flops)
        assert computed == pytest.approx(found, rel=0.01), options


@pytest.mark.parametrize("size", [(128, 128), (100, 180)])
@pytest.mark.parametrize("kind", ["next", "onevision_resampled"])
def test_flops_with_merging_in_the_tower_are_at_most_what_is_said(kind, size):
    """Groups of padding alone depend on the pixels; without any, the count is exact."""
    model = pitome_vlm.wrap(anyres_model(kind), keep=0.25)
    cost = costs(model, text_tokens=9, image_size=size)
    tower, projector, prefill = counted(model, anyres_batch(model, rows=((size,),), texts=(5,)))
    assert cost.tower_flops == pytest.approx(tower, rel=0.01)
    assert cost.prefill_flops == pytest.approx(prefill, rel=0.01)
    assert projector <= cost.projector_flops * 1.001
    if kind == "next" and size == (128, 128):
        assert cost.projector_flops == pytest.approx(projector, rel=0.01)


def test_a_description_says_which_image_it_is_about():
    model = anyres_model()
    told = pitome_vlm.describe(model, image_size=(128, 128), config=MergeConfig(keep=0.25))
    assert "of 128 x 128 pixels" in told.summary
    text = str(told)
    assert "tiles of 64 patches: 5, packed to 320 patches and 16 newlines" in text
    assert "tokens after the projector: 5 x" in text
    values = json.loads(json.dumps(told.to_dict()))
    assert (values["tokens_in"], values["tokens_out"]) == (336, 84)
    assert (values["image_size"], values["tiles"]) == ([128, 128], 5)
    assert pitome_vlm.describe(model).image_size == (768, 1024)
    from_a_config = from_config(model.config, MergeConfig(keep=0.25), image_size=(128, 128))
    assert from_a_config.count == told.count


@pytest.mark.parametrize(
    ("size", "error"),
    [((0, 5), ValueError), ((5, 2.5), TypeError), (7, TypeError), ("ab", TypeError)],
)
def test_no_size_of_an_image(size, error):
    with pytest.raises(error, match=r"image(_size| height| width) must be"):
        pitome_vlm.describe(anyres_model(), image_size=size)


def test_known_counts_of_published_checkpoints():
    """LLaVA-NeXT's 2,928 tokens of a 672 x 672 image; 144 per tile keep a quarter of them."""
    model = anyres_checkpoint_model()
    config = model.config
    config.vision_config.image_size, config.vision_config.patch_size = 336, 14
    config.image_grid_pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    footprint, count = planned_count(model, MergeConfig(tokens=144), image_size=(672, 672))
    assert (footprint.full, footprint.tiles, footprint.newlines) == (2928, 5, 48)
    assert count.out == 732


# --- training


def test_a_collated_batch_is_shortened_to_the_same_loss(tmp_path):
    processor = anyres_processor()
    rows = records(tmp_path, 4)
    for index, row in enumerate(rows):
        row["image"] = f"{index}.png"
        noise(40 + 60 * index, 150, index).save(tmp_path / row["image"])
    data = open_conversations(write_lines(tmp_path / "train.jsonl", rows))
    model = pitome_vlm.wrap(anyres_checkpoint_model(), keep=0.25)
    batch = Collator(processor)([data[index] for index in range(4)])
    short = shorten(model, batch)
    found = prompt_images(model, batch)
    assert [one.row for one in found] == [0, 1, 2, 3]
    assert len({one.full for one in found}) > 1
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).loss, model(**short).loss)
    assert short["input_ids"].shape[1] < batch["input_ids"].shape[1]


def test_training_and_loading_back(folder, tmp_path):
    data = write_lines(tmp_path / "train.jsonl", records(tmp_path, 4))
    model, processor = pitome_vlm.load(folder, keep=0.25, dtype="float32")
    result = train(
        model, processor, data, tmp_path / "adapter", max_steps=2, per_device_train_batch_size=2
    )
    again, processor = pitome_vlm.load(result.output_dir, base=folder, dtype="float32")
    batch = processor(images=noise(100, 150), text=QUESTION, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, result.model.eval()(**batch).logits)


# --- lmms-eval


def prompts(count, continuation=None):
    call = Call("task", "test", 0, {}, False, first=lambda doc: doc)
    sizes = [(100, 150), (40, 160), (90, 90), (200, 30)][:count]
    return [
        Prompt(call=call, text=QUESTION, images=[noise(*size, i)], continuation=continuation)
        for i, size in enumerate(sizes)
    ]


@pytest.mark.parametrize("keep", [0.25, "auto"])
def test_the_engine_counts_what_the_model_saw(keep):
    model = pitome_vlm.wrap(anyres_checkpoint_model(), keep=keep)
    engine = Engine(model, anyres_processor())
    options = {"max_new_tokens": 2, "do_sample": False}
    together = engine.answer(prompts(4), options)
    assert engine.work.images == 4
    alone = [engine.answer([prompt], options)[0] for prompt in prompts(4)]
    assert [one.input_tokens for one in together] == [one.input_tokens for one in alone]
    seen = sum(one.input_tokens for one in (*together, *alone))
    assert engine.work.visual_tokens == seen - 8 * 9  # words of the question


@pytest.mark.parametrize("keep", [0.25, "auto"])
def test_scores_of_a_batch_are_those_of_each_alone(keep):
    model = pitome_vlm.wrap(anyres_checkpoint_model(), keep=keep)
    engine = Engine(model, anyres_processor())
    together = engine.score(prompts(4, "red"))
    for prompt, score in zip(prompts(4, "red"), together, strict=True):
        (alone,) = engine.score([prompt])
        assert alone.log_likelihood == pytest.approx(score.log_likelihood, abs=1e-4)
        assert alone.input_tokens == score.input_tokens


# --- CLI, and what says that it cannot


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_info_takes_the_size_of_an_image(folder):
    found = run("info", "--model", folder, "--keep", 0.25, "--image-size", "180x100", "--json")
    assert found.exit_code == 0, found.output
    values = json.loads(found.stdout)
    assert (values["tokens_in"], values["tokens_out"]) == (114, 29)
    assert values["image_size"] == [100, 180]


@pytest.mark.parametrize("size", ["180", "0x5", "axb", "1x2x3", "-4x5"])
def test_info_refuses_what_is_no_size(folder, size):
    found = run("info", "--model", folder, "--image-size", size)
    assert found.exit_code == 2
    assert "image-size must be WIDTHxHEIGHT" in found.stderr


def test_the_overview_and_the_tiles_are_drawn():
    """All patches of the packed image and no newline."""
    model, processor = anyres_checkpoint_model(), anyres_processor()
    for keep in (1.0, 0.25):
        pitome_vlm.wrap(model, keep=keep)
        overview, tiles = source_maps(model, processor, noise(180, 100))
        assert (overview.title, tiles.title) == ("overview", "tiles")
        assert overview.groups.grid == (6, 6)
        inputs = processor.image_processor(images=noise(180, 100), return_tensors="pt")
        with torch.no_grad():
            visual = pitome_vlm.encode_images(model, **inputs)
        assert overview.groups.tokens == visual.counts[0]
        shown = [*overview.groups.groups.ravel(), *tiles.groups.groups.ravel()]
        newlines = tiles.groups.grid[0]
        assert len(shown) == visual.full_counts[0] - newlines
        lines = (visual.features[0] == model.model.image_newline).all(1).nonzero()[:, 0].tolist()
        assert lines
        assert set(shown) == set(range(visual.counts[0])) - set(lines)
    with pytest.raises(ValueError, match="has no square grid of one size; source_maps gives"):
        source_map(model, processor, noise(90, 90))
