"""What `--model_args`, messages and generation options of the lmms-eval plugin mean."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
from PIL import Image

from pitome_vlm.demo import checkpoint_path
from pitome_vlm.lmms.arguments import ModelArguments, combined
from pitome_vlm.lmms.engine import generation_options, joined, stop_strings
from pitome_vlm.lmms.requests import generation_call, opened, plain_messages
from pitome_vlm.measure.asking import prompt_text
from pitome_vlm.merge.config import MergeConfig, option_names


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("keep=0.25", "pretrained is missing"),
        ("pretrained=demo,keap=0.25", "unknown model argument 'keap'. Did you mean 'keep'?"),
        ("pretrained=demo,preset_=paper", "Did you mean 'preset'?"),
        ("pretrained=demo,keep=0.25,tokens=36", "exactly one of keep, tokens, ratio"),
        ("pretrained=demo,keep=1.5", r"keep must be in \(0, 1\], got 1.5"),
        ("pretrained=demo,keep=quarter", "keep must be a number"),
        ("pretrained=demo,keep=0.25,algorithm=tomme", "tomme.*tome"),
        ("pretrained=demo,algorithm=tome", "exactly one of keep, tokens, ratio"),
        ("pretrained=demo,keep=0.25,energy=gausian", "Did you mean 'gaussian'?"),
        ("pretrained=demo,keep=0.25,preset=paperr", "Did you mean 'paper'?"),
        ("pretrained=demo,preset=released", "exactly one of keep, tokens, ratio must be given"),
        ("pretrained=demo,keep=0.25,layers=[1,", r"layers is no valid JSON"),
        ("pretrained=demo,keep=0.25,dtype=int8", "dtype must be auto, float32"),
        ("pretrained=demo,keep=0.25,load_in_4bit=yes", "load_in_4bit must be True or False"),
        ("pretrained=demo,keep=0.25,load_in_4bit=true,load_in_8bit=true", "only one of"),
        ("pretrained=demo,keep=0.25,batch_size=0", "batch_size must be at least 1, got 0"),
        ("pretrained=demo,keep=0.25,batch_size=auto", "batch_size must be a whole number"),
        ("pretrained=demo,keep=0.25,max_pixels=0", "max_pixels must be at least 1, got 0"),
        ("pretrained=demo,keep=0.25,device=cpu,device_map=auto", "only one of device and"),
        ("pretrained=demo,keep=0.25,peft=./nowhere", "peft=./nowhere: no such folder"),
        ("pretrained=demo,tokens=999", "tokens must be"),
        ("pretrained=./nowhere,keep=0.25", "no such folder: './nowhere'"),
        ("pretrained", "model_args must be name=value pairs"),
        ("pretrained=demo,batch_size=2,device=cpu", "batch_size is given twice"),
    ],
)
def test_wrong_model_args(text, said):
    from pitome_vlm.lmms.model import PitomeLlava

    options = {"batch_size": "8" if "twice" in said else 1, "max_batch_size": None}
    with pytest.raises((ValueError, TypeError, OSError), match=said) as caught:
        PitomeLlava.create_from_arg_string(text, options)
    assert "\n" not in str(caught.value)


def test_model_args_are_understood():
    values = {"keep": 1, "layers": "[1, 3]", "margin": "None", "seed": 3.0, "batch_size": "4"}
    parsed = ModelArguments.parse({"pretrained": "demo", "system_prompt": "'a, b'"} | values)
    assert parsed.pretrained == str(checkpoint_path())
    assert parsed.merging == {"keep": 1, "layers": [1, 3], "seed": 3}
    assert (parsed.batch_size, parsed.system_prompt) == (4, "a, b")
    every = MergeConfig(tokens=36).to_dict()
    named = {name: every[name] for name in option_names("pitome_plus")}
    assert MergeConfig.from_dict(ModelArguments.parse({"pretrained": "x"} | named).merging) == (
        MergeConfig(tokens=36)
    )
    preset = ModelArguments.parse({"pretrained": "x", "preset": "released", "ratio": 0.9})
    assert preset.merging == {"config": MergeConfig.preset("released", ratio=0.9)}
    merging = ModelArguments.parse({"pretrained": "x", "algorithm": "none"}).merging
    assert MergeConfig.from_dict(merging) == MergeConfig(keep=1.0, algorithm="none")
    assert combined({"batch_size": 4}, {"batch_size": "1", "device": "cpu"}) == {
        "batch_size": 4,
        "device": "cpu",
    }


def test_images_are_scaled_down_only_where_asked(tmp_path):
    image = Image.new("L", (200, 100))
    assert opened(image, None).size == (200, 100)
    assert opened(image, 20_000).size == (200, 100)
    assert opened(image, 5_000).size == (100, 50)
    assert opened(image, 1).size == (1, 1)
    image.save(tmp_path / "a.png")
    assert opened(tmp_path / "a.png", None).mode == "RGB"
    with pytest.raises(TypeError, match=r"an image must be a path, bytes.*, got int"):
        opened(3, None)


def test_images_as_datasets_store_them_are_images(tmp_path):
    def parts(visual):
        request = SimpleNamespace(args=("q", {}, [visual], 0, "task", "test"), metadata={})
        return plain_messages(generation_call(request, simple=True).first(None), "<image>", None)

    Image.new("L", (20, 10)).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    for visual in ({"bytes": content, "path": None}, {"bytes": None, "path": f"{tmp_path}/a.png"}):
        _, (image,) = parts(visual)
        assert opened(image, None).size == (20, 10)
    with pytest.raises(ValueError, match="this one holds video"):
        parts({"bytes": None, "path": "a.mp4"})


def test_messages():
    image = {"type": "image", "url": "a"}
    text = {"type": "text", "text": "what is it"}
    found, images = plain_messages([{"role": "user", "content": [image, text]}], "<image>", "Hi")
    assert [turn["role"] for turn in found] == ["system", "user"]
    assert found[1]["content"] == [{"type": "image"}, text]
    assert images == ["a"]
    marked = {"type": "text", "text": "first <image> then <image> ok"}
    raw = [{"role": "user", "content": [image, {"type": "image", "url": "b"}, marked]}]
    found, images = plain_messages(raw, "<image>", None)
    assert [part["type"] for part in found[0]["content"]] == [
        "text",
        "image",
        "text",
        "image",
        "text",
    ]
    assert images == ["a", "b"]


def test_prompt_without_a_chat_template():
    class Processor:
        chat_template = None
        image_token = "<image>"

        class tokenizer:
            eos_token = "</s>"

    said = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat"}]},
        {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
    ]
    assert prompt_text(Processor, said) == (
        "Be brief. USER: <image>\nWhat? ASSISTANT: A cat</s>USER: Sure? ASSISTANT:"
    )


def test_generation_options(caplog):
    assert generation_options({}) == {"max_new_tokens": 1024, "do_sample": False}
    greedy = {"temperature": 0, "do_sample": True, "top_p": 1.0, "num_beams": 1, "until": ["x"]}
    assert generation_options(greedy) == {
        "max_new_tokens": 1024,
        "do_sample": False,
        "num_beams": 1,
    }
    assert generation_options({"temperature": 0.5})["do_sample"] is True
    with caplog.at_level(logging.WARNING):
        generation_options({"moon_phase": 1})
        generation_options({"moon_phase": 1})
    assert caplog.text.count("moon_phase") == 1
    assert stop_strings({"until": "\n"}) == ["\n"]
    assert stop_strings({"until": None}) == []
    with pytest.raises(ValueError, match="until must be text"):
        stop_strings({"until": [3]})


def test_word_boundary_of_continuations():
    assert joined("assistant:", "red") == ("assistant:", " red")
    assert joined("assistant: ", " red") == ("assistant:", " red")
    assert joined("assistant:\n", "red") == ("assistant:\n", "red")
