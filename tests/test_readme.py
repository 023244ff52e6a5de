"""README and pages stay true: their Python runs, figures are the measured ones, names exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_batch, tiny_model

import pitome_vlm
from pitome_vlm.demo import checkpoint_path, load_split, scene_image
from pitome_vlm.measure.asking import question_prompt
from pitome_vlm.merge import registry
from scripts.demo import readme, report
from scripts.demo.stored import later_words

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PYTHON = (ROOT / "docs/python.md").read_text()
STORED = json.loads((ROOT / "eval/results/demo/results.json").read_text())
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("[es]*/README.md")]


def blocks(page):
    return re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)


@pytest.fixture
def scope(tmp_path):
    """What docs/python.md leaves to the reader: a path, an image, a prompt, a batch."""
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


def test_the_readme_is_short():
    assert len(README.split()) <= 900


def test_the_snippets_of_the_readme_run_as_written(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    offline, large = blocks(README)
    scope = {}
    exec(offline, scope)
    (shown,) = re.findall(r"# (\w+)$", offline, flags=re.MULTILINE)
    assert capsys.readouterr().out == f"{shown}\n"
    exec(large.replace("llava-hf/llava-1.5-7b-hf", str(checkpoint_path())), scope)
    assert "144 -> 36 visual tokens per image" in capsys.readouterr().out
    model, fresh = scope["model"], pitome_vlm.load("demo")[0]
    prompt = question_prompt(scope["processor"], "what is this")
    image = scene_image(0, "val")
    inputs = scope["processor"](images=image, text=prompt, return_tensors="pt").to(fresh.dtype)
    assert torch.equal(model(**inputs).logits, fresh(**inputs).logits)


def test_the_snippet_of_the_quickstart_runs_as_written(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (code,) = blocks((ROOT / "docs/quickstart.md").read_text())
    exec(code, {})
    answers = [line.split(": ")[1] for line in capsys.readouterr().out.splitlines()]
    assert answers == ["three"] * 5


def test_the_snippet_of_the_python_page_runs(scope, capsys):
    (code,) = blocks(PYTHON)
    four_bit = code.index("model, processor = pitome_vlm.load(path, keep=0.25, load_in_4bit")
    compact = code.index("batch = pitome_vlm.compact_inputs")
    exec(code[:four_bit] + code[compact:], scope)
    assert "144 -> 72 visual tokens per image" in capsys.readouterr().out
    assert scope["loss"].isfinite()
    assert scope["visual"].sizes()[0].sum() == 144
    exec(code[four_bit:compact], scope)
    assert scope["model"].is_loaded_in_4bit


def test_every_public_name_is_in_the_python_page():
    missing = [n for n in pitome_vlm.__all__ if n != "__version__" and n not in PYTHON]
    assert not missing


def test_every_file_the_readme_points_to_exists():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert len(links) >= 4
    assert all((ROOT / link).exists() for link in links)


def test_every_make_target_the_readme_names_exists():
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"`?make ([a-z-]+)", README))
    assert {"demo", "test"} <= named
    assert all(re.search(rf"^{name}:", makefile, flags=re.MULTILINE) for name in named)


@pytest.fixture(scope="module")
def measured():
    """The stored answers of the demo benchmark."""
    return readme.Measured(*report.from_raw(STORED), STORED["times"], STORED["provenance"])


def test_the_figures_of_the_readme_are_the_measured_ones(measured, tmp_path):
    page = tmp_path / "README.md"
    page.write_text(README)
    readme.update_readme(
        page, headline=readme.headline(measured), table=readme.readme_table(measured)
    )
    assert page.read_text() == README, "run the benchmark with --rewrite --readme README.md"


@pytest.mark.slow
def test_the_committed_report_is_the_measured_one(measured):
    written = report.report(
        measured.samples,
        measured.rows,
        STORED["costs"],
        measured.facts,
        times=measured.times,
        later=later_words(STORED),
    )
    assert written == (ROOT / "eval/results/demo/report.md").read_text()


def test_the_stored_answers_are_to_the_questions_of_this_version(measured):
    assert measured.samples == load_split("test")
    assert len(measured.samples) >= 2000


def test_pages_are_short():
    lengths = {
        page.name: len(page.read_text().splitlines()) for page in (ROOT / "docs").glob("*.md")
    }
    assert len(lengths) > 20
    assert {name: length for name, length in lengths.items() if length > 150} == {}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_between_pages_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_scripts_and_targets_that_pages_name_exist(page):
    text = page.read_text()
    makefile = (ROOT / "Makefile").read_text()
    for name in set(re.findall(r"scripts(?:\.\w+){2}", text)):
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), name
    for name in set(re.findall(r"scripts/\w+/\w+\.(?:py|sh)", text)):
        assert (ROOT / name).is_file(), name
    for name in set(re.findall(r"`make ([a-z-]+)", text)):
        assert re.search(rf"^{name}:", makefile, flags=re.MULTILINE), name


def test_the_algorithm_of_the_contributing_guide_works():
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL)
    try:
        # Without this file's future annotations.
        exec(compile(code, "guide", "exec", dont_inherit=True), {"__name__": "evenly"})
        model = pitome_vlm.wrap(tiny_model(), keep=0.25, algorithm="evenly", shift=2)
        visual = pitome_vlm.encode_images(model, tiny_batch()["pixel_values"])
        assert visual.counts == [36] * 3
        with pytest.raises(ValueError, match="shift must be at least 0"):
            pitome_vlm.MergeConfig(keep=0.25, algorithm="evenly", shift=-1)
    finally:
        registry._known.pop("evenly", None)
