"""Commands on tiny checkpoints of families that are merged after the tower, by their processors."""

from __future__ import annotations

import json
import random
import re

import pytest
import tiny_families
import torch
from checkpoint_families import NEEDS_TORCHVISION, PROCESSORS, TORCHVISION, save_family
from cli_runner import fails_in_one_line, run
from PIL import Image
from training_data import records, write_lines
from transformers import AutoConfig, AutoProcessor

import pitome_vlm
from pitome_vlm.adapters import model_types
from pitome_vlm.adapters.refused import REFUSED
from pitome_vlm.demo import load_split, scene_image
from pitome_vlm.loading.checkpoints import read_config
from pitome_vlm.measure.asking import encoded, question_prompt

RUNS = [name for name in PROCESSORS if TORCHVISION or name not in NEEDS_TORCHVISION]
# Their images have as many tokens as their size asks for, at most so many with these processors.
ANY_SIZE = ("qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v", "mistral3", "lfm2_vl")
LARGEST = 144
UNITS = dict.fromkeys(("internvl", "smolvlm", "idefics3", "aya_vision"), "tile")
QUESTION = "what colour is the circle ?"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return {name: save_family(name, root / name) for name in PROCESSORS}


def test_processors_that_cannot_be_loaded_are_one_line(folders, image):
    for name in sorted(set(PROCESSORS) - set(RUNS)):
        result = run("ask", "--model", folders[name], "--image", image, QUESTION)
        fails_in_one_line(result, "the processor cannot be loaded")
        assert "torchvision" in result.stderr.lower(), name


def test_info_counts_what_the_processor_writes(folders):
    draw = random.Random(0)
    for name in RUNS:
        processor = AutoProcessor.from_pretrained(folders[name])
        placeholder = AutoConfig.from_pretrained(folders[name]).image_token_id
        for _ in range(2):
            width, height = draw.randint(33, 94), draw.randint(33, 94)
            text = question_prompt(processor, QUESTION)
            batch = encoded(processor, [text], [Image.new("RGB", (width, height))])
            seen = int((batch["input_ids"] == placeholder).sum())
            size = f"{width}x{height}"
            result = run("info", "--model", folders[name], "--image-size", size, "--json")
            told = json.loads(result.stdout)
            if told["image_size"] is None:
                assert seen % told["tokens_in"] == 0, (name, size)
            else:
                assert seen == told["tokens_in"], (name, size)


def test_what_has_no_size_is_said_to_be_a_tile_or_an_image(folders):
    words = {"idefics3": "tile", "internvl": "tile", "gemma3": "image"}
    for name, word in words.items():
        text = run("info", "--model", folders[name], "--keep", 0.25).stdout
        assert f"16 -> 4 visual tokens per {word}\n" in text
        assert f"visual tokens per {word} " in text


def test_frames_are_counted_by_grid(folders):
    """Qwen makes one grid of two frames."""
    words = ["info", "--model", folders["qwen3_vl"], "--frames", 7, "--image-size", "64x32"]
    text = run(*words).stdout
    assert "128 -> 32 visual tokens per video of 7 frames of 64 x 32\npixels\n" in text
    assert "grids of 32 tokens (one for 2 frames), each merged on its own: 4\n" in text
    text = run(*words, "--temporal").stdout
    assert "grids of 32 tokens (one for 2 frames), 4 merged at a time: 4\n" in text
    fails_in_one_line(run(*words[:3], "--temporal"), "give their number with --frames")
    fails_in_one_line(run("info", "--model", folders["gemma3"], "--frames", 2), "no videos")


def test_graphs_of_towers_are_of_one_grid(folders, tmp_path):
    words = ["--model", folders["gemma3"], "--no-synthetic", "--no-plot", "--output", tmp_path]
    result = run("verify", *words)
    assert result.exit_code == 2
    assert "are not one grid of one size" in result.stderr.splitlines()[-1]


@pytest.mark.slow
def test_ask_and_chat(folders, image):
    for name in RUNS:
        words = ["--model", folders[name], "--image", image, "--max-new-tokens", 3]
        whole = run("ask", *words, "--keep", 1, QUESTION)
        merged = run("ask", *words, "--image", image, "--keep", 0.5, QUESTION)
        chat = run("chat", *words, "--keep", 0.5, text=f"{QUESTION}\nhow many ?\n/quit\n")
        for result in (whole, merged, chat):
            assert result.exit_code == 0, (name, result.stderr)
            assert result.stdout.strip(), name


def test_ask_on_tiles(folders, image):
    words = ["--model", folders["idefics3"], "--image", image, "--max-new-tokens", 2]
    result = run("ask", *words, "--keep", 0.5, QUESTION)
    assert result.exit_code == 0, result.stderr


def test_gemma_s_images_see_themselves(folders, image):
    """Its processor's token types reach the model."""
    processor = AutoProcessor.from_pretrained(folders["gemma3"])
    batch = encoded(processor, [question_prompt(processor, QUESTION)], [Image.open(image)])
    assert int(batch["token_type_ids"].sum()) == 16


@pytest.mark.slow
def test_bench_makes_up_images(folders, tmp_path):
    for name in RUNS:
        words = ["--keep", 0.5, "--repeats", 1, "--answer-tokens", 2, "--output", tmp_path / name]
        result = run("bench", "--model", folders[name], *words, "--image-size", "48x64")
        assert result.exit_code == 0, (name, result.stderr)


def test_groups_of_any_grid_are_drawn(folders, image, tmp_path):
    """Every tile next to the others; an algorithm that is compared gets a row of them."""
    for name in RUNS:
        out = tmp_path / name
        words = ["--model", folders[name], "--image", image, "--output", out, "--size", 96]
        result = run("visualize", *words, "--keep", 0.5)
        assert result.exit_code == 0, (name, result.stderr)
        compared = run("visualize", *words, "--keep", 0.5, "--algorithms", "random,pool")
        assert compared.exit_code == 0, (name, compared.stderr)
        alone, both = (Image.open(out / f"scene one-{word}.png") for word in ("merged", "compared"))
        tiles = 1 + 4 * (name == "idefics3")
        assert alone.width >= 96 * tiles, name
        assert both.width >= 96 * tiles, name


@pytest.mark.slow
def test_training_on_every_family(folders, image, tmp_path):
    data = write_lines(tmp_path / "data.jsonl", records(tmp_path, 8))
    for name in RUNS:
        words = ["--model", folders[name], "--data", data, "--output", tmp_path / name]
        words += ["--keep", 0.5, "--batch-size", 2, "--val-fraction", 0.25]
        result = run("train", *words)
        assert result.exit_code == 0, (name, result.stderr)
        model, _ = pitome_vlm.load(tmp_path / name)
        targets = {key.split(".lora_")[0] for key in model.state_dict() if ".lora_" in key}
        assert targets, name
        assert not any("vis" in target for target in targets), name
        asked = run("ask", "--model", tmp_path / name, "--image", image, QUESTION)
        assert asked.exit_code == 0, (name, asked.stderr)


@pytest.fixture
def questions(tmp_path):
    """About images of eight sizes, one each."""
    lines = []
    sizes = [(120, 120), (90, 60), (60, 90), (64, 64), (150, 100), (200, 70), (40, 40), (100, 130)]
    for sample, size in zip(load_split("train", 48)[::6], sizes, strict=True):
        name = f"{sample.scene_id}.png"
        scene_image(sample.scene_id, "train").resize(size).save(tmp_path / name)
        lines.append({"image": name, "question": sample.question})
    return write_lines(tmp_path / "questions.jsonl", lines)


def cells(folder):
    """What was asked under each setting."""
    return [json.loads(path.read_text()) for path in (folder / "cells").iterdir()]


@pytest.mark.slow
def test_tune_on_every_family(folders, questions, tmp_path):
    """What has so many tokens is said where images have counts of their own."""
    words = ["--data", questions, "--algorithms", "tome", "--max-loss", 0.9, "--no-plot"]
    for name in RUNS:
        folder, more = tmp_path / name, ["--max-new-tokens", 2]
        result = run("tune", "--model", folders[name], *words, *more, "--output", folder)
        assert result.exit_code == 0, (name, result.stderr)
        told = json.loads((folder / "result.json").read_text())
        assert len({one["tokens"] for one in told["search"]}) >= 2, name
        unit = "image of 1024 x 768 pixels" if name in ANY_SIZE else UNITS.get(name)
        said = [note for note in told["notes"] if note.startswith("tokens are counted per ")]
        expected = f"tokens are counted per {unit}; every image keeps the same share of its own"
        assert said == [expected] * (unit is not None), name
        assert f"visual tokens per {unit or 'image'}; computed for it" in result.stdout, name


@pytest.mark.slow
def test_eval_on_every_family(folders, tmp_path, monkeypatch):
    """Costs are those of images as the processor makes them."""
    from pitome_vlm.lmms import evaluation, tasks_path

    # Without lmms-eval's own 2000 tasks, which take long to index.
    index = evaluation.TaskManager("ERROR", [str(tasks_path())], include_defaults=False)
    monkeypatch.setattr(evaluation, "TaskManager", lambda *a, **k: index)
    words = ["--suite", "demo", "--limit", 2, "--algorithms", "tome", "--tokens", 4]
    for name in RUNS:
        folder, more = tmp_path / name, ["--no-timing", "--no-plot"]
        result = run("eval", "--model", folders[name], *words, *more, "--output", folder)
        assert result.exit_code == 0, (name, result.stderr)
        facts = [one["facts"] for one in cells(folder)]
        assert len(facts) == 2, name
        for one in facts:
            assert 16 <= one["visual_tokens_unreduced"] <= LARGEST, name
            assert ("image_size" in one) == (name in ANY_SIZE), name


def test_other_families_are_refused_before_weights_are_read(tmp_path):
    for model_type, reason in REFUSED.items():
        folder = tmp_path / model_type
        config = AutoConfig.for_model(model_type)
        config.save_pretrained(folder)
        assert model_type not in model_types()
        where = f"has model_type {model_type!r}, which is not supported: {reason}"
        with pytest.raises(TypeError, match=re.escape(where)):
            read_config(folder)
        model = torch.nn.Module()
        model.config = config
        with pytest.raises(TypeError, match=f"^cannot wrap Module .*{re.escape(reason)}"):
            pitome_vlm.wrap(model, keep=0.5)


def test_every_command_refuses_them(tmp_path, image):
    folder, out = tmp_path / "mllama", ["--output", tmp_path / "out"]
    AutoConfig.for_model("mllama").save_pretrained(folder)
    data = write_lines(tmp_path / "data.jsonl", records(tmp_path, 4))
    for command in (
        *(["info"], ["ask", "--image", image, QUESTION], ["chat", "--image", image], ["bench"]),
        *(["visualize", "--image", image, *out], ["train", "--data", data, *out]),
        ["verify", "--no-synthetic", *out],
    ):
        result = run(command[0], "--model", folder, *command[1:])
        assert result.exit_code == 2, command
        last = result.stderr.splitlines()[-1]
        assert re.match(f"error: .*{REFUSED['mllama']}", last), command


def test_budgets_are_checked_as_elsewhere(folders):
    for name in folders:
        for words, message in (
            (["--keep", "2"], "keep must be in (0, 1]"),
            (["--tokens", "99999"], "tokens must be in 1.."),
            (["--algorithm", "visionzip", "--option", "stage=projector"], "visionzip"),
        ):
            fails_in_one_line(run("info", "--model", folders[name], *words), message)
    assert set(folders) <= {*tiny_families.FAMILIES, "qwen2_5_vl"}
