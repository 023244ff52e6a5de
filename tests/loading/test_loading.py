from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from absent import hide
from checkpoint import WEIGHTS, edit_json, edit_weights, save_checkpoint
from PIL import Image
from safetensors.torch import load_file

from pitome_vlm.demo import checkpoint_path, resolve
from pitome_vlm.loading.checkpoints import read_config
from pitome_vlm.loading.models import load, saved_merge_config
from pitome_vlm.loading.quantization import compute_dtype, quantised_modules
from pitome_vlm.merge.config import CONFIG_NAME, MergeConfig
from pitome_vlm.wrapping.wrap import is_wrapped, merge_config, schedule_of

PROMPT = "user: <image> what colour is the circle ? assistant:"


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("good"))


@pytest.fixture
def folder(good, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(good, tmp_path / "model"))


def fails(error, *said, **arguments):
    """`load` fails with one line that says all of `said`."""
    with pytest.raises(error) as caught:
        load(**arguments)
    text = str(caught.value)
    assert "\n" not in text
    for part in said:
        assert str(part) in text, text


def answer(model, processor, n=4):
    image = Image.effect_mandelbrot((120, 120), (-2, -1, 1, 1), 50).convert("RGB")
    inputs = processor(images=image, text=PROMPT, return_tensors="pt")
    inputs = inputs.to(dtype=model.dtype)
    with torch.no_grad():
        return model.generate(**inputs, max_new_tokens=n, min_new_tokens=n, do_sample=False)


class TestLoad:
    def test_plain(self, good):
        model, processor = load(good)
        assert not is_wrapped(model)
        assert not model.training
        assert answer(model, processor).shape[1] > 144

    @pytest.mark.parametrize("budget", [{"keep": 0.25}, {"tokens": 36}])
    def test_budget_wraps(self, good, budget):
        model, processor = load(str(good), **budget)
        assert schedule_of(model).tokens_out == 36
        assert answer(model, processor).shape[1] == answer(*load(good)).shape[1]

    def test_options_reach_the_config(self, good):
        model, _ = load(good, ratio=0.9, algorithm="tome", stage="tower")
        config = merge_config(model)
        assert (config.ratio, config.algorithm, config.stage) == (0.9, "tome", "tower")

    def test_dtype_and_attention(self, good):
        model, _ = load(good, dtype="bfloat16", attn_implementation="eager")
        assert model.dtype == torch.bfloat16
        assert model.config._attn_implementation == "eager"
        assert load(good, dtype=None)[0].dtype == torch.float32

    def test_device_map(self, good):
        model, _ = load(good, device_map="cpu", keep=0.5)
        assert {p.device.type for p in model.parameters()} == {"cpu"}
        assert is_wrapped(model)

    @pytest.mark.parametrize("value", ["float33", torch.int8, 3])
    def test_bad_dtype(self, good, value):
        fails(ValueError, "dtype", "bfloat16", value, path=good, dtype=value)

    def test_bad_options_are_named(self, good):
        fails(ValueError, "kep", "keep", path=good, kep=0.5)
        fails(ValueError, "exactly one", path=good, algorithm="tome")
        fails(ValueError, "exactly one", path=good, keep=0.5, tokens=3)
        fails(ValueError, "tokens", "1..144", "1000", path=good, tokens=1000)


class TestSavedMergeConfig:
    @pytest.fixture
    def saved(self, good, tmp_path):
        model, processor = load(good, tokens=20, algorithm="tome")
        model.save_pretrained(tmp_path / "saved")
        processor.save_pretrained(tmp_path / "saved")
        return tmp_path / "saved"

    def test_restores(self, saved):
        config = merge_config(load(saved)[0])
        assert config == MergeConfig(tokens=20, algorithm="tome") == saved_merge_config(saved)

    def test_budget_replaces_budget_only(self, saved):
        assert merge_config(load(saved, keep=0.5)[0]) == MergeConfig(keep=0.5, algorithm="tome")

    def test_option_keeps_budget(self, saved):
        config = merge_config(load(saved, algorithm="pitome")[0])
        assert config == MergeConfig(tokens=20, algorithm="pitome")

    def test_config_replaces_all(self, saved):
        config = MergeConfig(ratio=0.8)
        assert merge_config(load(saved, config=config)[0]) == config
        (saved / CONFIG_NAME).write_text("{")
        assert merge_config(load(saved, config=config)[0]) == config

    def test_damaged(self, saved):
        (saved / CONFIG_NAME).write_text('{"keep": 3}')
        fails(ValueError, saved / CONFIG_NAME, "keep", "(0, 1]", path=saved)

    def test_none(self, good):
        assert saved_merge_config(good) is None


class TestPath:
    @pytest.mark.parametrize("path", ["/nope/model", "./nope", "~/nope", "a/b/c", "", "nope/"])
    def test_missing(self, path):
        fails(FileNotFoundError, "no such folder", path.lstrip("~"), path=path)

    def test_missing_beside_what_exists(self, good, monkeypatch):
        monkeypatch.chdir(good.parent)
        fails(FileNotFoundError, f"{good.name}/nope", path=f"{good.name}/nope")
        fails(FileNotFoundError, "nope", path=Path("nope"))

    @pytest.mark.parametrize("name", ["some-org/no-such-model", "no-such-model", "a b"])
    def test_hub_name(self, name):
        # The hub is out of reach here (HF_HUB_OFFLINE), which is an error of the hub as well.
        fails(OSError, name, "hub", "folder", path=name, local_files_only=True)

    def test_a_hub_out_of_reach_is_asked_once(self, monkeypatch):
        asked = []

        def no_network(*args, **source):
            asked.append(args)
            raise RuntimeError("no route to host")

        monkeypatch.setattr("pitome_vlm.loading.checkpoints.file_exists", no_network)
        fails(OSError, "some-org/no-such-model", "no route to host", path="some-org/no-such-model")
        assert asked == [("some-org/no-such-model", "config.json")]

    def test_file(self, good):
        fails(NotADirectoryError, "is a file", path=good / "config.json")

    def test_empty_folder(self, tmp_path):
        fails(ValueError, tmp_path, "no config.json", path=tmp_path)

    def test_adapter_folder(self, tmp_path):
        (tmp_path / "adapter_config.json").write_text("{}")
        fails(ValueError, tmp_path, "PEFT", "base model", path=tmp_path)

    def test_wrong_type(self):
        fails(TypeError, "NoneType", path=None)

    def test_the_bundled_model_is_called_demo_unless_a_folder_is(self, good, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        bundled = load("demo", keep=0.25)[0]
        assert bundled.name_or_path == str(checkpoint_path())
        assert (schedule_of(bundled).tokens_in, schedule_of(bundled).tokens_out) == (144, 36)
        (tmp_path / "demo").mkdir()  # an output folder is not a model
        assert resolve("demo") == str(checkpoint_path())
        shutil.copytree(good, "demo", dirs_exist_ok=True)
        assert load("demo")[0].name_or_path == "demo"


class TestConfig:
    @pytest.mark.parametrize("text", ['{"a":', "[1]", "{}", "\x00"])
    def test_damaged(self, folder, text):
        (folder / "config.json").write_text(text)
        fails((ValueError, TypeError), folder, path=folder)

    def test_other_model_is_refused_before_weights(self, folder):
        (folder / "config.json").write_text('{"model_type": "gpt2"}')
        (folder / WEIGHTS).write_bytes(b"would fail")
        fails(TypeError, folder, "gpt2", "docs/models.md", path=folder)

    def test_original_llava_package(self, folder):
        (folder / "config.json").write_text('{"model_type": "llava", "mm_vision_tower": "x"}')
        fails(TypeError, "original llava", "llava-hf", path=folder)

    @pytest.mark.parametrize("part", ["vision_config", "text_config"])
    def test_unknown_part(self, folder, part):
        inner = json.loads((folder / "config.json").read_text())[part]
        edit_json(folder / "config.json", **{part: inner | {"model_type": "xyz"}})
        fails(ValueError, folder, "config.json", "xyz", path=folder)

    def test_read_config_needs_no_weights(self, folder):
        (folder / WEIGHTS).unlink()
        assert read_config(folder).vision_config.num_hidden_layers == 4


class TestWeights:
    def test_cut_off(self, folder):
        content = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(content[: len(content) // 2])
        fails(ValueError, folder, "damaged", path=folder)

    def test_missing_weights_are_no_random_ones(self, folder):
        edit_weights(folder, lambda w: {k: v for k, v in w.items() if "linear_1" not in k})
        fails(ValueError, folder, "lacks 2", "multi_modal_projector.linear_1", path=folder)

    def test_other_shapes(self, folder):
        edit_weights(folder, lambda w: {k: v[:3] if "linear_1" in k else v for k, v in w.items()})
        fails(ValueError, folder, "shapes", path=folder)

    def test_pickle_only_on_request(self, folder):
        torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
        (folder / WEIGHTS).unlink()
        fails(ValueError, folder, "safetensors", "allow_pickle=True", path=folder)
        assert not is_wrapped(load(folder, allow_pickle=True)[0])

    def test_unread_parts_of_the_tower_may_be_missing(self, folder):
        edit_weights(folder, lambda w: {k: v for k, v in w.items() if "post_layernorm" not in k})
        load(folder)

    @pytest.mark.parametrize("level", ["vision_tower.vision_model.", "vision_tower."])
    def test_tower_names_of_every_release(self, good, folder, level):
        def rename(name):
            return name.replace("vision_tower.vision_model.", "vision_tower.").replace(
                "vision_tower.", level
            )

        edit_weights(folder, lambda w: {rename(k): v for k, v in w.items()})
        renamed, original = load(folder)[0].state_dict(), load(good)[0].state_dict()
        assert renamed.keys() == original.keys()
        assert all(torch.equal(renamed[name], original[name]) for name in original)


class TestProcessor:
    def test_old_processor_is_completed(self, good, folder):
        edit_json(
            folder / "processor_config.json",
            patch_size=None,
            vision_feature_select_strategy=None,
            num_additional_image_tokens=None,
        )
        model, processor = load(folder, keep=0.25)
        assert (processor.patch_size, processor.num_additional_image_tokens) == (10, 1)
        assert processor.vision_feature_select_strategy == "default"
        assert torch.equal(answer(model, processor), answer(*load(good, keep=0.25)))

    def test_complete_processor_is_left_alone(self, folder):
        edit_json(folder / "processor_config.json", num_additional_image_tokens=7)
        assert load(folder)[1].num_additional_image_tokens == 7

    def test_missing_processor(self, folder):
        for name in ("preprocessor_config.json", "processor_config.json"):
            (folder / name).unlink(missing_ok=True)
        fails(ValueError, folder, "processor", path=folder)


class TestQuantization:
    @pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
    def test_language_model_only(self, good, bits):
        model, processor = load(good, keep=0.25, dtype="float32", **{bits: True})
        found = quantised_modules(model)
        # q, k, v, o, gate, up, down of two layers; not lm_head, tower or projector
        assert len(found) == 14
        assert all(".language_model." in f".{name}" for name in found)
        assert answer(model, processor).shape == answer(*load(good, keep=0.25)).shape

    def test_4bit_is_nf4_with_double_quantisation(self, good):
        settings = load(good, load_in_4bit=True)[0].config.quantization_config
        assert settings.bnb_4bit_quant_type == "nf4"
        assert settings.bnb_4bit_use_double_quant
        assert settings.bnb_4bit_compute_dtype == compute_dtype()

    def test_quantised_tower_is_noticed(self, good, monkeypatch):
        # What a release does that reads the patterns in yet another way.
        monkeypatch.setattr("pitome_vlm.loading.quantization.SKIPPED", ("lm_head",))
        fails(RuntimeError, "vision_tower", "llm_int8_skip_modules", path=good, load_in_4bit=True)

    def test_nothing_quantised_is_noticed(self, good, monkeypatch):
        monkeypatch.setattr("pitome_vlm.loading.quantization.SKIPPED", ("model", "lm_head"))
        fails(RuntimeError, "no linear layer", path=good, load_in_4bit=True)

    def test_one_way_only(self, good):
        fails(ValueError, "load_in_4bit", path=good, load_in_4bit=True, load_in_8bit=True)
        fails(ValueError, "load_in_4bit", path=good, load_in_4bit=True, quantization_config={})

    def test_bitsandbytes_missing(self, good, monkeypatch):
        hide(monkeypatch, "bitsandbytes")
        fails(ImportError, 'pip install ".[quant]"', path=good, load_in_4bit=True)

    def test_compute_dtype_follows_the_cpu(self, monkeypatch):
        for flags, expected in (
            ({"avx512_bf16": False, "avx2": True}, torch.float32),
            ({"avx512_bf16": True}, torch.bfloat16),
        ):
            monkeypatch.setattr(
                torch.cpu, "get_capabilities", lambda flags=flags: flags, raising=False
            )
            assert compute_dtype("cpu") == expected
