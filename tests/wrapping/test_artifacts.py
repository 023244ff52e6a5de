"""Adapters remember base, quantisation and merging: saved, loaded, merged, pushed."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint import edit_json, edit_weights, save_checkpoint, tiny_config
from huggingface_hub import ModelCard
from huggingface_hub.errors import RepositoryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import LlavaForConditionalGeneration

import pitome_vlm
from pitome_vlm.demo.processor import build_processor
from pitome_vlm.loading.quantization import quantised_modules
from pitome_vlm.merge.config import CONFIG_NAME, MergeConfig
from pitome_vlm.training import KeepMerging, LoraOptions, prepare, save_adapter, target_modules
from pitome_vlm.wrapping.peft_record import RECORD_NAME, PeftRecord
from pitome_vlm.wrapping.wrap import is_wrapped, merge_config

TARGETS = r".*language_model.*\.(q_proj|v_proj|down_proj)"
BITS = {"none": {}, "nf4": {"load_in_4bit": True}, "int8": {"load_in_8bit": True}}
FILES = (CONFIG_NAME, RECORD_NAME)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("llava"))


def loaded(path, **options):
    return pitome_vlm.load(path, **({"dtype": "float32"} | options))[0]


def lora(model, seed=0, **options):
    torch.manual_seed(seed)
    config = LoraConfig(**({"target_modules": TARGETS, "r": 4} | options))
    config.init_lora_weights = False
    return get_peft_model(model, config).eval()


def logits(model, seed=0):
    torch.manual_seed(seed)
    pixels = torch.randn(1, 3, 120, 120)
    ids = torch.tensor([[1, 5, *[4] * 144, 20, 21, 6]])
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=pixels.to(model.dtype)).logits


def refused(error, path, *said, **options):
    with pytest.raises(error) as caught:
        pitome_vlm.load(path, **options)
    text = str(caught.value)
    assert "\n" not in text
    for part in said:
        assert str(part) in text, text


@pytest.fixture
def adapter(checkpoint, tmp_path) -> Path:
    model = pitome_vlm.wrap(lora(loaded(checkpoint)), tokens=16, algorithm="tome")
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


# --- saving


class TestSaving:
    def test_wrapping_a_peft_model(self, adapter, checkpoint):
        config = MergeConfig.from_pretrained(adapter)
        assert (config.tokens, config.algorithm) == (16, "tome")
        record = PeftRecord.load(adapter / RECORD_NAME)
        assert (record.base_model, record.base_dtype) == (str(checkpoint), "float32")
        assert record.quantization is None

    def test_lora_around_a_wrapped_model(self, checkpoint, tmp_path):
        model = lora(pitome_vlm.wrap(loaded(checkpoint), tokens=16))
        save_adapter(model, tmp_path / "a")
        assert MergeConfig.from_pretrained(tmp_path / "a") == merge_config(model)
        prepared = prepare(pitome_vlm.wrap(loaded(checkpoint), tokens=9), LoraOptions(rank=2))
        prepared.save_pretrained(tmp_path / "b")
        assert MergeConfig.from_pretrained(tmp_path / "b").tokens == 9

    def test_a_trainer_of_one_s_own(self, checkpoint):
        model = lora(pitome_vlm.wrap(loaded(checkpoint), tokens=16))
        before = type(model)
        KeepMerging().on_train_begin(None, None, None, model=model)
        assert type(model) is not before
        plain = lora(loaded(checkpoint))
        KeepMerging().on_train_begin(None, None, None, model=plain)
        assert type(plain) is PeftModel

    def test_further_adapters_and_other_ranks(self, checkpoint, tmp_path):
        model = pitome_vlm.wrap(lora(loaded(checkpoint)), tokens=16)
        model.add_adapter("second", LoraConfig(target_modules=TARGETS, r=2))
        model.save_pretrained(tmp_path / "a")
        for name in FILES:
            assert (tmp_path / "a" / name).is_file()
            assert (tmp_path / "a" / "second" / name).is_file()
        model.save_pretrained(tmp_path / "b", selected_adapters=["second"])
        assert not (tmp_path / "b" / CONFIG_NAME).exists()
        assert merge_config(pitome_vlm.load(tmp_path / "b" / "second")[0]).tokens == 16
        model.save_pretrained(tmp_path / "c", is_main_process=False)
        assert not (tmp_path / "c" / CONFIG_NAME).exists()

    def test_unwrapping_leaves_the_peft_model_as_it_was(self, checkpoint, tmp_path):
        model = lora(loaded(checkpoint))
        expected, keys, kind = logits(model), list(model.state_dict()), type(model)
        pitome_vlm.wrap(model, tokens=16)
        assert not torch.equal(logits(model), expected)
        assert type(model).__name__ == "PeftModel"
        assert isinstance(model, PeftModel)
        pitome_vlm.unwrap(model)
        assert type(model) is kind
        assert list(model.state_dict()) == keys
        assert torch.equal(logits(model), expected)
        model.save_pretrained(tmp_path)
        assert not any((tmp_path / name).exists() for name in FILES)

    def test_unwrapping_only_what_is_inside(self, checkpoint, tmp_path):
        model = pitome_vlm.wrap(lora(loaded(checkpoint)), tokens=16)
        pitome_vlm.unwrap(model.get_base_model())
        model.save_pretrained(tmp_path)
        assert not any((tmp_path / name).exists() for name in FILES)

    def test_copies_and_pickles(self, checkpoint, tmp_path):
        model = pitome_vlm.wrap(lora(loaded(checkpoint)), tokens=16)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(logits(other), logits(model))
            shutil.rmtree(tmp_path / "x", ignore_errors=True)
            other.save_pretrained(tmp_path / "x")
            assert (tmp_path / "x" / CONFIG_NAME).is_file()

    def test_only_peft_models(self, checkpoint, tmp_path):
        with pytest.raises(TypeError, match="PeftModel"):
            save_adapter(loaded(checkpoint, tokens=16), tmp_path)
        with pytest.raises(ValueError, match="not wrapped"):
            save_adapter(lora(loaded(checkpoint)), tmp_path / "x")
        assert not (tmp_path / "x").exists()


# --- loading


class TestLoading:
    @pytest.mark.parametrize("bits", BITS)
    @pytest.mark.parametrize("wrap_first", [True, False])
    def test_round_trip_is_exact(self, checkpoint, tmp_path, bits, wrap_first):
        model = loaded(checkpoint, **BITS[bits])
        if wrap_first:
            model = lora(pitome_vlm.wrap(model, tokens=16))
        else:
            model = pitome_vlm.wrap(lora(model), tokens=16)
        save_adapter(model, tmp_path)
        again, processor = pitome_vlm.load(tmp_path)
        assert isinstance(again, PeftModel)
        assert not again.training
        assert merge_config(again) == merge_config(model)
        assert quantised_modules(again) == quantised_modules(model)
        assert torch.equal(logits(again), logits(model))
        image = Image.new("RGB", (60, 60), "red")
        inputs = processor(text="user: <image> x assistant:", images=image, return_tensors="pt")
        assert again.generate(**inputs, max_new_tokens=2).shape[1] > 144

    def test_what_is_given_wins(self, adapter):
        assert merge_config(loaded(adapter, tokens=30)) == MergeConfig(tokens=30, algorithm="tome")
        other = MergeConfig(keep=0.5)
        assert merge_config(loaded(adapter, config=other)) == other
        assert len(quantised_modules(loaded(adapter, load_in_4bit=True))) == 14
        assert loaded(adapter, dtype="bfloat16").dtype == torch.bfloat16

    def test_a_quantised_adapter_on_a_whole_base(self, checkpoint, tmp_path):
        pitome_vlm.wrap(lora(loaded(checkpoint, load_in_4bit=True)), tokens=16).save_pretrained(
            tmp_path
        )
        assert not quantised_modules(loaded(tmp_path, quantization_config=False))
        assert len(quantised_modules(loaded(tmp_path, load_in_8bit=True))) == 14

    def test_merged_weights_give_the_adapter_s_outputs(self, adapter):
        model = loaded(adapter).double()
        expected = logits(model)
        merged = model.merge_and_unload()
        assert is_wrapped(merged)
        assert isinstance(merged, LlavaForConditionalGeneration)
        torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)

    def test_merged_models_are_saved_with_the_settings(self, adapter, tmp_path):
        merged = loaded(adapter).merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        build_processor().save_pretrained(tmp_path / "merged")
        again = loaded(tmp_path / "merged")
        assert merge_config(again) == merge_config(merged)
        torch.testing.assert_close(logits(again), logits(merged))

    def test_trainable(self, adapter):
        closed, opened = loaded(adapter), loaded(adapter, trainable=True)
        assert not any(p.requires_grad for p in closed.parameters())
        names = [name for name, p in opened.named_parameters() if p.requires_grad]
        assert names
        assert all("lora_" in name for name in names)

    def test_an_adapter_of_plain_peft(self, checkpoint, tmp_path):
        model = lora(loaded(checkpoint))
        model.save_pretrained(tmp_path)
        again = loaded(tmp_path)
        assert not is_wrapped(again)
        assert torch.equal(logits(again), logits(model))
        assert is_wrapped(loaded(tmp_path, tokens=16))

    def test_a_base_that_was_moved(self, checkpoint, tmp_path):
        here = Path(shutil.copytree(checkpoint, tmp_path / "here"))
        model = pitome_vlm.wrap(lora(loaded(here)), tokens=16)
        model.save_pretrained(tmp_path / "adapter")
        there = here.rename(tmp_path / "there")
        refused(FileNotFoundError, tmp_path / "adapter", here, "base=PATH")
        again = loaded(tmp_path / "adapter", base=there)
        assert torch.equal(logits(again), logits(model))

    def test_base_is_for_adapters(self, checkpoint):
        refused(ValueError, checkpoint, "base=", "adapters", base="x")


class TestAdaptersThatDoNotFit:
    def test_other_shapes(self, adapter, tmp_path):
        config = tiny_config()
        config.text_config.intermediate_size = 32
        self.other(tmp_path / "other", config)
        # The probe of weights would notice too; here the layers are looked at.
        edit_json(adapter / RECORD_NAME, base_probe=None)
        refused(ValueError, adapter, adapter, "does not fit", base=tmp_path / "other")

    @pytest.mark.parametrize("layers", [1, 3])
    def test_other_depth(self, adapter, tmp_path, layers):
        config = tiny_config()
        config.text_config.num_hidden_layers = layers
        self.other(tmp_path / "other", config)
        edit_json(adapter / RECORD_NAME, base_probe=None)
        refused(ValueError, adapter, adapter, "does not fit", base=tmp_path / "other")

    def test_another_model_of_the_same_shape(self, adapter, checkpoint, tmp_path):
        other = Path(shutil.copytree(checkpoint, tmp_path / "other"))
        edit_weights(other, lambda w: {k: -v if "embed_tokens" in k else v for k, v in w.items()})
        refused(ValueError, adapter, adapter, other, "another model", base=other)

    def test_rounding_makes_no_other_model(self, adapter):
        for dtype in ("bfloat16", "float16"):
            assert is_wrapped(loaded(adapter, dtype=dtype))

    def test_another_family(self, adapter, tmp_path):
        (tmp_path / "gpt").mkdir()
        (tmp_path / "gpt" / "config.json").write_text('{"model_type": "gpt2"}')
        refused(TypeError, adapter, "gpt2", base=tmp_path / "gpt")

    @pytest.mark.parametrize(
        ("name", "content", "said"),
        [
            ("adapter_config.json", "{", "adapter_config.json"),
            ("adapter_config.json", "{}", "adapter_config.json"),
            (RECORD_NAME, "{", RECORD_NAME),
            (RECORD_NAME, "[]", RECORD_NAME),
            (RECORD_NAME, '{"base_model": 3}', "base_model"),
            (CONFIG_NAME, '{"keep": 9}', CONFIG_NAME),
            ("adapter_model.safetensors", "x", "damaged"),
        ],
    )
    def test_damaged_files(self, adapter, name, content, said):
        (adapter / name).write_text(content)
        refused(ValueError, adapter, said)

    def test_missing_weights(self, adapter):
        (adapter / "adapter_model.safetensors").unlink()
        refused(ValueError, adapter, adapter, "allow_pickle")

    def test_no_base_at_all(self, adapter):
        edit_json(adapter / RECORD_NAME, base_model=None)
        edit_json(adapter / "adapter_config.json", base_model_name_or_path=None)
        refused(ValueError, adapter, "base=PATH")

    @staticmethod
    def other(folder, config):
        torch.manual_seed(1)
        LlavaForConditionalGeneration(config).save_pretrained(folder)
        build_processor().save_pretrained(folder)


# --- the card, and the hub


class TestCard:
    def test_it_says_what_a_reader_needs(self, checkpoint, tmp_path):
        from pitome_vlm.wrapping.peft import remember_training

        model = prepare(
            loaded(checkpoint, tokens=16, algorithm="tome", load_in_4bit=True), LoraOptions(rank=2)
        )
        accuracy = {"loss": 2.0, "answer_accuracy": 0.25, "token_accuracy": 0.5, "answers": 40}
        facts = {
            "data": "scenes.jsonl, 400 conversations",
            "validation": "held.jsonl",
            "lora": "rank 2",
            "recipe": "100 steps",
            "before": accuracy,
            "after": accuracy | {"answer_accuracy": 0.75, "loss": 1.0},
        }
        remember_training(model, facts)
        model.save_pretrained(tmp_path)
        text = (tmp_path / "README.md").read_text()
        for said in (
            "16 of 144 visual tokens",
            "tokens=16",
            "tome",
            "nf4",
            "scenes.jsonl, 400 conversations",
            "held.jsonl",
            "| answers right % | 25 | 75 |",
            "| loss | 2 | 1 |",
            "pitome_vlm.load(",
        ):
            assert said in text, said
        assert "More Information Needed" not in text
        card = ModelCard.load(tmp_path / "README.md")
        assert card.data["library_name"] == "peft"
        assert {"lora", "pitome-vlm"} <= set(card.data["tags"])
        # What was remembered comes along when the adapter is loaded and saved again.
        again = pitome_vlm.load(tmp_path)[0]
        again.save_pretrained(tmp_path / "copy")
        assert "| answers right % | 25 | 75 |" in (tmp_path / "copy" / "README.md").read_text()

    def test_saving_again_replaces_the_section_only(self, adapter):
        card = adapter / "README.md"
        card.write_text(card.read_text() + "\nWritten by me.\n")
        model = pitome_vlm.load(adapter)[0]
        pitome_vlm.wrap(model, tokens=30)
        model.save_pretrained(adapter)
        text = card.read_text()
        assert text.count("pitome-vlm begin") == text.count("Written by me.") == 1
        assert "30 of 144" in text
        assert "16 of 144" not in text

    def test_a_card_of_one_s_own_is_kept(self, checkpoint, tmp_path):
        (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n\nAll mine.\n")
        pitome_vlm.wrap(lora(loaded(checkpoint)), tokens=16).save_pretrained(tmp_path)
        card = ModelCard.load(tmp_path / "README.md")
        assert card.data["license"] == "mit"
        assert "All mine." in card.text
        assert "16 of 144" in card.text


class TestPushToHub:
    @pytest.fixture
    def hub(self, monkeypatch):
        """The hub's two calls, and what they were given; no card is on it yet."""
        import pitome_vlm.wrapping.card as module

        seen = {}

        class Hub:
            def create_repo(self, repo_id, **options):
                seen["create"] = options
                return type("Url", (), {"repo_id": repo_id})()

            def upload_folder(self, *, repo_id, folder_path, **options):
                folder = Path(folder_path)
                files = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
                seen.update(repo=repo_id, files=files, **options)
                return "commit"

        real = ModelCard.load

        def load(name, **options):
            if not Path(name).is_file():
                response = type("R", (), {"headers": {}, "request": None, "status_code": 404})()
                raise RepositoryNotFoundError("none", response=response)
            return real(name, **options)

        monkeypatch.setattr(module, "HfApi", Hub)
        monkeypatch.setattr(module.ModelCard, "load", load)
        return seen

    def test_everything_next_to_the_adapter_goes_with_it(self, adapter, hub):
        model = pitome_vlm.load(adapter)[0]
        done = model.push_to_hub("me/adapter", private=True, commit_message="hi", tags=["mine"])
        assert done == "commit"
        assert (hub["repo"], hub["create"]["private"], hub["commit_message"]) == (
            "me/adapter",
            True,
            "hi",
        )
        names = {*FILES, "adapter_config.json", "adapter_model.safetensors", "README.md"}
        assert names == hub["files"].keys()
        assert b"16 of 144" in hub["files"]["README.md"]
        assert b"- mine" in hub["files"]["README.md"]
        assert json.loads(hub["files"][CONFIG_NAME])["tokens"] == 16


def test_the_target_expression_survives_the_round_trip(checkpoint, tmp_path):
    model = prepare(loaded(checkpoint, tokens=16), LoraOptions(rank=2))
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["target_modules"] == target_modules(loaded(checkpoint))
    assert stored["base_model_name_or_path"] == str(checkpoint)
