"""The README stays true: its Python runs, its table is the measured one, its names exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from tiny import tiny_model

import pitome_vlm
from pitome_vlm.demo import checkpoint_path, load_split, scene_image
from pitome_vlm.measure.asking import question_prompt
from scripts.demo import report

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def scope(tmp_path):
    """What the README leaves to the reader: a path, an image, a prompt, a batch."""
    path = checkpoint_path()
    model, processor = pitome_vlm.load(path, dtype="float32")
    sample = load_split("val", 1)[0]
    image = scene_image(sample.scene_id, "val")
    prompt = question_prompt(processor, sample.question)
    batch = dict(processor(images=image, text=prompt, return_tensors="pt"))
    adapter = LoraConfig(target_modules=r".*language_model.*q_proj", r=2)
    return {
        "pitome_vlm": pitome_vlm,
        "path": path,
        "folder": tmp_path / "saved",
        "model": model,
        "processor": processor,
        "peft_model": get_peft_model(tiny_model(), adapter),
        "image": image,
        "prompt": prompt,
        "batch": batch | {"labels": batch["input_ids"]},
        "pixel_values": batch["pixel_values"],
    }


def test_the_first_snippet_runs_and_leaves_the_model_as_it_was(scope, capsys):
    exec(BLOCKS[0], scope)
    assert "144 -> 36 visual tokens per image" in capsys.readouterr().out
    assert scope["answer"].shape[1] > scope["batch"]["input_ids"].shape[1]
    fresh, _ = pitome_vlm.load(scope["path"])
    inputs = scope["batch"] | {"pixel_values": scope["pixel_values"].to(fresh.dtype)}
    assert torch.equal(scope["model"](**inputs).logits, fresh(**inputs).logits)


def test_the_second_snippet_runs(scope):
    code = BLOCKS[1]
    four_bit = code.index("model, processor = pitome_vlm.load(path, keep=0.25, load_in_4bit")
    compact = code.index("batch = pitome_vlm.compact_inputs")
    exec(code[:four_bit] + code[compact:], scope)
    assert scope["loss"].isfinite()
    assert scope["visual"].sizes()[0].sum() == 144
    exec(code[four_bit:compact], scope)
    assert scope["model"].is_loaded_in_4bit


def test_every_public_name_is_in_the_readme():
    missing = [n for n in pitome_vlm.__all__ if n != "__version__" and n not in README]
    assert not missing


def test_every_file_the_readme_points_to_exists():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert len(links) >= 4
    assert all((ROOT / link).exists() for link in links)
    with Image.open(ROOT / "docs/assets/overlay.png") as shown:
        assert shown.width > 1000


def test_every_make_target_the_readme_names_exists():
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"`?make ([a-z-]+)", README))
    assert {"demo", "test"} <= named
    assert all(re.search(rf"^{name}:", makefile, flags=re.MULTILINE) for name in named)


def test_the_committed_table_is_the_measured_one():
    results = json.loads((ROOT / "eval/results/demo/results.json").read_text())
    samples, rows = report.from_raw(results)
    table = report.readme_table(samples, rows, results["costs"], results["provenance"])
    assert table in README
    # The answers were given to the questions this version asks.
    assert samples == load_split("test")
    assert len(samples) >= 2000


@pytest.mark.slow
def test_the_committed_report_is_the_measured_one():
    results = json.loads((ROOT / "eval/results/demo/results.json").read_text())
    samples, rows = report.from_raw(results)
    page = report.report(samples, rows, results["costs"], results["provenance"])
    assert page == (ROOT / "eval/results/demo/report.md").read_text()
