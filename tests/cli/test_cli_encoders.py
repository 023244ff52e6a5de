"""Commands on checkpoints of encoders on their own."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import tiny_clip_checkpoint
import torch
import transformers as hf
from cli_runner import fails_in_one_line, run
from PIL import Image
from tiny_encoders import SIDE, TINY

import pitome_vlm
from pitome_vlm.lmms.arguments import ModelArguments
from pitome_vlm.lmms.loader import load_model
from pitome_vlm.wrapping.wrap import is_wrapped, merge_config


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    clip, dino, mae = (tmp_path_factory.mktemp(name) for name in ("clip", "dino", "mae"))
    tiny_clip_checkpoint.save(clip)
    for folder, name in ((dino, "dinov2 classes"), (mae, "mae")):
        TINY[name].model().save_pretrained(folder)
        tiny_clip_checkpoint.image_processor("ViT").save_pretrained(folder)
    Image.radial_gradient("L").convert("RGB").save(clip / "image.png")
    return clip, dino, mae


def test_load(folders):
    clip, dino, mae = folders
    model, processor = pitome_vlm.load(clip, ratio=0.9)
    assert type(model).__name__ == "CLIPModel"
    assert hasattr(processor, "tokenizer")
    assert is_wrapped(model)
    model, processor = pitome_vlm.load(dino)
    assert type(model).__name__ == "Dinov2ForImageClassification"
    assert not is_wrapped(model)
    made = processor(images=Image.new("RGB", (70, 50)), return_tensors="pt")
    assert made["pixel_values"].shape == (1, 3, SIDE, SIDE)
    pitome_vlm.wrap(model, keep=0.5, algorithm="tome").save_pretrained(dino / "wrapped")
    processor.save_pretrained(dino / "wrapped")
    assert merge_config(pitome_vlm.load(dino / "wrapped")[0]).algorithm == "tome"
    assert type(pitome_vlm.load(mae)[0]).__name__ == "ViTMAEModel"
    with pytest.raises(ValueError, match="cannot be loaded quantised"):
        pitome_vlm.load(clip, load_in_4bit=True)


def test_a_checkpoint_without_its_head_is_refused(folders, tmp_path):
    hf.Dinov2Model.from_pretrained(folders[1]).save_pretrained(tmp_path)
    tiny_clip_checkpoint.image_processor("ViT").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["Dinov2ForImageClassification"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"lacks .* weights of a Dinov2ForImageClassification"):
        pitome_vlm.load(tmp_path)


def test_info(folders):
    for folder in folders:
        shown = run("info", "--model", str(folder), "--ratio", "0.8").stdout
        assert "encoder" in shown, folder
    found = json.loads(run("info", "--model", str(folders[0]), "--ratio", "0.8", "--json").stdout)
    assert found["flops"]["saved_percent"] > 10


def test_visualize(folders, tmp_path):
    image = str(folders[0] / "image.png")
    for folder in folders[:2]:
        out = tmp_path / folder.name
        given = ("--model", str(folder), "--image", image, "--ratio", "0.8", "-o", str(out))
        run("visualize", *given)
        assert Image.open(out / "image-merged.png").size == (512, 544)  # with a caption


def test_bench(folders, tmp_path):
    given = ("--model", str(folders[1]), "--keep", "0.5", "--repeats", "2", "--batch", "1,2")
    shown = run("bench", *given, "-o", str(tmp_path)).stdout
    assert "keep=0.5" in shown
    assert "images/s" in shown
    saved = json.loads((tmp_path / "results.json").read_text())["encoders"]
    assert [one["batch"] for one in saved] == [1, 2]
    whole, merged = saved[0]["budgets"]
    assert merged["flops"] < whole["flops"]
    assert len(whole["times"]) == 2
    assert "| keep=0.5 |" in (tmp_path / "report.md").read_text()


def test_commands_that_ask_questions_refuse_encoders(folders):
    image = str(folders[0] / "image.png")
    for words in (("ask", "--image", image, "What is it?"), ("chat", "--image", image)):
        result = run(words[0], "--model", str(folders[0]), *words[1:])
        fails_in_one_line(result, "is an encoder on its own and answers no questions")


def test_training_refuses_encoders_once_the_data_is_read(folders, tmp_path):
    image, data = str(folders[0] / "image.png"), tmp_path / "data.json"
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    data.write_text(json.dumps([{"image": image, "conversations": turns}] * 4))
    given = ("--model", str(folders[0]), "--data", str(data), "-o", str(tmp_path / "run"))
    result = run("train", *given)
    assert result.exit_code == 2
    last = result.stderr.splitlines()[-1]
    assert "is an encoder on its own and answers no questions" in last
    assert not (tmp_path / "run").exists()


def test_lmms_eval_refuses_encoders(folders):
    arguments = ModelArguments.parse({"pretrained": str(folders[0])})
    with pytest.raises(ValueError, match="is an encoder on its own and answers no questions"):
        load_model(arguments, SimpleNamespace(num_processes=1, device=torch.device("cpu")))
