"""`tune` with the bundled model: what it is asked, how it is left, and the guide's code."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration
from tuning import write_jsonl

import pitome_vlm
from pitome_vlm.demo import checkpoint_path, load_split, scene_image
from pitome_vlm.measure.tune import Recipe, Row, default_recipes, read_rows, tune
from pitome_vlm.measure.tune.asking import UNREDUCED, kl_divergence
from pitome_vlm.measure.tune.split import split_by_image
from pitome_vlm.merge.config import MergeConfig
from pitome_vlm.wrapping.wrap import merge_config


@pytest.fixture(scope="module")
def demo():
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint_path(), dtype=torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(checkpoint_path())


def demo_rows(count=24, **changes):
    return [
        Row((scene_image(s.scene_id, "val"),), s.question, changes.get("answers", (s.answer,)))
        for s in load_split("val", count)[::3]
    ]


ONE = [Recipe("tome", {"algorithm": "tome"})]


def one_by_one(model, processor, row, config):
    """Answer and first distribution of one row by transformers' own calls."""
    inputs = processor(
        images=list(row.images),
        text=f"user: <image> {row.question} assistant:",
        return_tensors="pt",
    )
    with pitome_vlm.wrapped(model, config=config), torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=2, do_sample=False)
        logits = model(**inputs).logits[0, -1]
    text = processor.tokenizer.decode(
        out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return text.strip(), torch.log_softmax(logits.double(), -1)


def test_a_model_is_asked_what_it_would_be_asked_by_hand(demo):
    model, processor = demo
    rows = demo_rows()
    result = tune(
        model, processor, rows, recipes=ONE, budgets=[16], batch_size=3, max_new_tokens=2,
        max_loss=0.99,
    )  # fmt: skip
    (cell,), (check,) = result.cells, result.checks
    config = MergeConfig(tokens=16, algorithm="tome")
    assert result.config == config
    parts = split_by_image([(row.images[0].tobytes().hex()[:4000],) for row in rows], seed=0)
    for part, found in ((parts.search, cell), (parts.check, check)):
        scores = {"none": [], "tome": []}
        divergence = []
        for row, said in zip(part, found.answers, strict=True):
            plain, before = one_by_one(model, processor, rows[row], UNREDUCED)
            answer, after = one_by_one(model, processor, rows[row], config)
            assert said == answer
            scores["none"].append(plain in rows[row].answers)
            scores["tome"].append(answer in rows[row].answers)
            divergence.append(float((before.exp() * (before - after)).sum()))
        assert found.loss.base == pytest.approx(np.mean(scores["none"]))
        assert found.loss.reduced == pytest.approx(np.mean(scores["tome"]))
        assert found.divergence == pytest.approx(np.mean(divergence), rel=1e-3, abs=1e-6)


def test_the_model_is_left_as_it_was_and_the_config_can_be_used(demo, tmp_path):
    model, processor = demo
    before = MergeConfig(keep=0.5, algorithm="pitome")
    pitome_vlm.wrap(model, config=before)
    model.train()
    try:
        result = tune(
            model, processor, demo_rows(), recipes=ONE, budgets=[72], max_new_tokens=3,
            folder=tmp_path, max_loss=0.99,
        )  # fmt: skip
        assert model.training
        assert merge_config(model) == before
    finally:
        pitome_vlm.unwrap(model.eval())
    names = {path.name for path in result.save(tmp_path)}
    assert names == {"loss_tokens.png", "result.json", "report.md", "pitome_config.json"}
    assert Image.open(tmp_path / "loss_tokens.png").size[0] > 800
    saved = MergeConfig.from_pretrained(tmp_path)
    assert saved == result.config == MergeConfig(tokens=72, algorithm="tome")
    report = (tmp_path / "report.md").read_text()
    for part in (
        result.statement,
        "72 of 144 visual tokens",
        "dtype float32",
        "seed 0",
        "batch_size 8",
    ):
        assert part in report
    assert json.loads((tmp_path / "result.json").read_text())["verdict"] == result.verdict


def test_every_default_recipe_runs_on_the_bundled_model(demo):
    model, processor = demo
    result = tune(
        model, processor, demo_rows(24, answers=()), budgets=[36], max_new_tokens=2, max_loss=0.99
    )  # fmt: skip
    names = [recipe.name for recipe in default_recipes()]
    assert [cell.recipe.name for cell in result.cells] == names
    assert not result.skipped
    assert all(cell.divergence >= 0 for cell in result.cells)
    assert result.checks[0].recipe.name in names


def test_a_resumed_run_asks_the_model_nothing_and_another_model_is_refused(
    demo, tmp_path, monkeypatch
):
    model, processor = demo
    options = {"recipes": ONE, "budgets": [36], "max_new_tokens": 2, "folder": tmp_path}
    first = tune(model, processor, demo_rows(), **options)

    def never(*args, **kwargs):
        raise AssertionError("asked again")

    with monkeypatch.context() as patch:
        patch.setattr(LlavaForConditionalGeneration, "generate", never)
        assert (
            tune(model, processor, demo_rows(), resume=True, **options).to_dict() == first.to_dict()
        )
    with pytest.raises(ValueError, match=r"with other settings \(data was 'sha256:"):
        tune(model, processor, demo_rows()[::-1], resume=True, **options)
    weight = model.model.multi_modal_projector.linear_1.weight
    with torch.no_grad():
        weight.mul_(1.01)
    try:
        with pytest.raises(ValueError, match=r"with other settings \(fingerprint was 'sha256:"):
            tune(model, processor, demo_rows(), resume=True, **options)
    finally:
        with torch.no_grad():
            weight.div_(1.01)


def test_rows_may_be_mappings_and_hold_several_images(demo):
    model, processor = demo
    rows = [
        {
            "images": [scene_image(2 * i, "val"), scene_image(2 * i + 1, "val")],
            "question": "how many circles?",
        }
        for i in range(6)
    ]
    result = tune(
        model, processor, rows, recipes=ONE, budgets=[36], max_new_tokens=2, max_loss=0.99
    )
    assert result.checks[0].loss.images == 3
    with pytest.raises(TypeError, match="row 1 must be a Row or a mapping, got str"):
        tune(model, processor, ["what?"])


def test_a_broken_image_is_named_with_its_row_before_anything_is_asked(demo, tmp_path):
    model, processor = demo
    for i in range(6):
        scene_image(i, "val").save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:300])
    file = write_jsonl(
        tmp_path, *({"image": f"{i}.png", "question": "what shape is it?"} for i in range(6))
    )
    with pytest.raises(
        ValueError, match=r"my.jsonl line 4: .*3.png: the file is damaged or cut off"
    ):
        tune(model, processor, read_rows(file), folder=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_copies_of_one_image_stay_in_one_part(demo, tmp_path):
    model, processor = demo
    for i in range(8):
        scene_image(i // 4, "val").save(tmp_path / f"{i}.png")
    file = write_jsonl(
        tmp_path, *({"image": f"{i}.png", "question": "what shape is it?"} for i in range(8))
    )
    with pytest.raises(ValueError, match=r"at least 4 different images are needed.*got 2"):
        tune(model, processor, read_rows(file))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 1, got -1"),
        ({"recipes": [Recipe("none", {"algorithm": "none"})]}, "recipe 'none': from 108 tokens on"),
    ],
)
def test_wrong_options_with_a_model(demo, change, message):
    with pytest.raises(ValueError, match=message):
        tune(*demo, demo_rows(), **change)


def test_prompts_are_checked(demo):
    model, processor = demo
    rows = [dataclasses.replace(row, question="see <image>") for row in demo_rows()]
    with pytest.raises(ValueError, match="row 1: the question must not contain '<image>'"):
        tune(model, processor, rows)


def test_divergence_is_kullback_leibler_and_counts_no_mass_as_nothing():
    p = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])
    q = torch.tensor([[0.25, 0.25, 0.5], [0.2, 0.3, 0.5]])
    found = kl_divergence(p.log(), q.log())
    assert found.tolist() == pytest.approx([math.log(2), 0.0], abs=1e-6)


# --- the guide


@pytest.mark.slow
def test_the_guide_s_python_and_data_are_true(demo, tmp_path, monkeypatch):
    guide = (Path(__file__).resolve().parents[2] / "docs" / "tune.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL)
    (lines,) = re.findall(r"```json\n(.*?)```", guide, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("my.jsonl").write_text(lines)
    for name in set(re.findall(r"[\w/]+\.(?:jpg|png)", lines)):
        # Images have to be there when rows are read.
        Path(name).parent.mkdir(exist_ok=True)
        scene_image(0, "val").save(name)
    assert [len(row.images) for row in read_rows("my.jsonl")] == [1, 1, 2]
    written = []
    for i, sample in enumerate(load_split("val", 24)[::2]):
        scene_image(sample.scene_id, "val").save(f"{i}.png")
        written.append({"image": f"{i}.png", "question": sample.question, "answer": sample.answer})
    write_jsonl(tmp_path, *written)
    model, processor = demo
    scope = {"model": model, "processor": processor, "pitome_vlm": pitome_vlm}
    try:
        exec(code, scope)
        assert merge_config(model) == scope["result"].config
    finally:
        pitome_vlm.unwrap(model)
    table = guide.split("## Files", 1)[1]
    for file in Path("tuned").iterdir():
        assert file.name in table
