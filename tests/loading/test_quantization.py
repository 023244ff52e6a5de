"""4-bit and 8-bit models with merging: what is quantised, what it weighs, where it goes."""

from __future__ import annotations

import gc
import warnings

import bitsandbytes as bnb
import pytest
import torch
from checkpoint import edit_json, save_checkpoint
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensor
from transformers import BitsAndBytesConfig
from typer.testing import CliRunner

import pitome_vlm
from pitome_vlm.cli import app
from pitome_vlm.demo import checkpoint_path
from pitome_vlm.lmms.arguments import ModelArguments
from pitome_vlm.loading.models import load
from pitome_vlm.loading.quantization import (
    check_quantised,
    compute_dtype,
    keep_unpackable,
    quantised_modules,
    quantization,
    recorded_quantization,
    unquantised_dtype,
)
from pitome_vlm.measure.weights import weights_of
from pitome_vlm.wrapping.peft_record import recorded

BITS = {"none": {}, "nf4": {"load_in_4bit": True}, "int8": {"load_in_8bit": True}}
LANGUAGE_LAYERS = 14


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("llava"))


def inputs(processor, model):
    image = Image.effect_mandelbrot((120, 120), (-2, -1, 1, 1), 50).convert("RGB")
    batch = processor(text="user: <image> what ? assistant:", images=image, return_tensors="pt")
    return batch.to(model.dtype)


def parts(names):
    return {
        part
        for part in ("language_model", "vision_tower", "multi_modal_projector", "lm_head")
        if any(part in name.split(".") for name in names)
    }


# --- what is quantised


class TestWhatIsQuantised:
    @pytest.mark.parametrize("bits", ["nf4", "int8"])
    @pytest.mark.parametrize("device_map", [None, "cpu", "auto", {"": "cpu"}], ids=str)
    def test_the_language_model_and_nothing_else(self, checkpoint, bits, device_map):
        model, processor = load(checkpoint, tokens=16, device_map=device_map, **BITS[bits])
        found = quantised_modules(model)
        assert len(found) == LANGUAGE_LAYERS
        assert parts(found) == {"language_model"}
        out = model.generate(**inputs(processor, model), max_new_tokens=3, do_sample=False)
        assert out.shape[1] > 144
        # The same modules with an adapter's own layers around some of them.
        from pitome_vlm.training import LoraOptions, prepare

        assert len(quantised_modules(prepare(model, LoraOptions(rank=2)))) == LANGUAGE_LAYERS

    def test_layers_that_the_packed_kernel_cannot_take_are_computed_all_the_same(self):
        # Rows of 160 are two and a half quantisation blocks; on CPUs with AVX512-BF16
        # bitsandbytes repacks in the first forward pass and fails there.
        model, processor = load(checkpoint_path(), tokens=36, load_in_4bit=True)
        layers = [m for m in model.modules() if type(m).__name__ == "Linear4bit"]
        assert any(layer.in_features % 64 for layer in layers)
        out = model.generate(**inputs(processor, model), max_new_tokens=2, do_sample=False)
        assert out.shape[1] > 144

    def test_only_unpackable_layers_are_kept_from_the_packed_kernel(self):
        shapes = {(128, 64): True, (160, 64): False, (128, 40): False}
        layers = [bnb.nn.Linear4bit(*shape, quant_type="nf4") for shape in shapes]
        model = torch.nn.Sequential(*layers).to("cpu")
        for layer in layers:
            layer.support_avx512bf16_for_cpu = True
        assert keep_unpackable(model) == 2
        assert [layer.support_avx512bf16_for_cpu for layer in layers] == list(shapes.values())

    def test_a_config_of_one_s_own_is_taken_as_it_is(self, checkpoint):
        own = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
        model = load(checkpoint, tokens=16, quantization_config=own)[0]
        assert model.config.quantization_config.bnb_4bit_quant_type == "fp4"
        assert parts(quantised_modules(model)) >= {"language_model", "vision_tower"}

    def test_a_wish_that_transformers_ignores_is_an_error(self, checkpoint):
        # Release 5 reads entries from the start of a path, so this one hits nothing.
        ignored = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["vision_tower"])
        with pytest.raises(
            RuntimeError, match=r"'vision_tower' were quantised.*model\.vision_tower"
        ):
            load(checkpoint, quantization_config=ignored)

    @pytest.mark.parametrize("wish", ["model.vision_tower", ".*vision_tower.*", "fc1"])
    def test_a_wish_that_is_granted_is_none(self, checkpoint, wish):
        own = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=[wish])
        found = quantised_modules(load(checkpoint, quantization_config=own)[0])
        assert not any("vision_tower" in n and (wish != "fc1" or "fc1" in n) for n in found)

    def test_a_layer_left_out_is_noticed(self, checkpoint):
        model = load(checkpoint, load_in_4bit=True)[0]
        check_quantised(model, language_model_only=True)
        model.model.language_model.layers[1].mlp.up_proj = torch.nn.Linear(64, 64, bias=False)
        with pytest.raises(RuntimeError, match=r"layers\.1\.mlp\.up_proj .* is not; pass"):
            check_quantised(model, language_model_only=True)


# --- dtypes


class Accelerator:
    """A device module as torch has one for every kind of accelerator."""

    def __init__(self, bfloat16: bool) -> None:
        self.bfloat16 = bfloat16

    def is_bf16_supported(self, including_emulation=True):
        return self.bfloat16 or including_emulation


class TestDtypes:
    @pytest.mark.parametrize(
        ("device", "module", "expected"),
        [
            ("cuda:0", Accelerator(True), torch.bfloat16),
            ("cuda:0", Accelerator(False), torch.float16),
            ("xpu", Accelerator(True), torch.bfloat16),
        ],
    )
    def test_compute_dtype_is_what_the_hardware_multiplies(
        self, monkeypatch, device, module, expected
    ):
        monkeypatch.setattr(torch, "get_device_module", lambda found: module)
        assert compute_dtype(device) == expected
        config = quantization(load_in_4bit=True, device_map=device)
        assert config.bnb_4bit_compute_dtype == expected

    def test_tower_and_projector_are_in_16_bits_where_those_are_fast(self, checkpoint, monkeypatch):
        flags = {"avx512_bf16": True}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags, raising=False)
        for bits in ("nf4", "int8"):
            model = load(checkpoint, tokens=16, **BITS[bits])[0]
            kinds = {p.dtype for p in model.model.vision_tower.parameters()}
            kinds |= {p.dtype for p in model.model.multi_modal_projector.parameters()}
            assert kinds == {torch.bfloat16}
        assert load(checkpoint)[0].dtype == torch.float32
        assert load(checkpoint, load_in_4bit=True, dtype="float32")[0].dtype == torch.float32

    def test_sixteen_bits_of_the_checkpoint_stay(self):
        for dtype in (torch.float16, torch.bfloat16, None):
            assert unquantised_dtype("auto", dtype, "cpu") == "auto"

    def test_a_recorded_config_comes_back_for_this_hardware(self, checkpoint):
        model = load(checkpoint, load_in_4bit=True)[0]
        values = recorded(model)
        again = recorded_quantization(values, "cpu")
        assert again.to_dict() == model.config.quantization_config.to_dict()
        from_gpu = recorded_quantization(values | {"bnb_4bit_compute_dtype": "bfloat16"}, "cpu")
        assert from_gpu.bnb_4bit_compute_dtype == compute_dtype("cpu")
        assert recorded(load(checkpoint)[0]) is None
        with pytest.raises(ValueError, match="gptq"):
            recorded_quantization({"quant_method": "gptq"})


# --- placement


class TestPlacement:
    def test_parts_on_disk_and_merging(self, checkpoint, tmp_path):
        expected_model, processor = load(checkpoint, tokens=16)
        batch = inputs(processor, expected_model)
        expected = expected_model(**batch).logits
        places = {
            "model.vision_tower": "disk",
            "model.multi_modal_projector": "cpu",
            "model.language_model": "cpu",
            "lm_head": "cpu",
        }
        for placed in (
            {"device_map": places},
            {"device_map": "auto", "max_memory": {"cpu": "400KB"}},
        ):
            model = load(checkpoint, tokens=16, offload_folder=tmp_path / "away", **placed)[0]
            assert any(p.device.type == "meta" for p in model.parameters())
            assert torch.equal(model(**batch).logits, expected)
            assert weights_of(model) == weights_of(expected_model)

    @pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
    def test_offloading_beside_an_accelerator_is_allowed_in_so_many_words(self, bits):
        mixed = quantization(device_map={"model": 0, "lm_head": "cpu"}, **{bits: True})
        assert mixed.llm_int8_enable_fp32_cpu_offload
        for whole in ({"": "cpu"}, {"": 0}, "auto", None):
            config = quantization(device_map=whole, **{bits: True})
            assert not config.llm_int8_enable_fp32_cpu_offload


# --- what it weighs


def alive() -> dict[int, int]:
    """Bytes of every tensor's storage that exists in this process, by address."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        # isinstance would wake up the lazy proxies of other libraries; fake tensors, which
        # torch.compile leaves in this process, have no storage.
        kind = type(thing)
        if issubclass(kind, torch.Tensor) and not issubclass(kind, FakeTensor):
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


class TestBytes:
    @pytest.mark.parametrize("bits", BITS)
    def test_description_states_what_is_measured(self, checkpoint, bits):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            first, processor = load(checkpoint, tokens=16, **BITS[bits])
            batch = inputs(processor, first)
            first(**batch)  # bitsandbytes' own tables are made once per process
            before = alive()
            model, _ = load(checkpoint, tokens=16, **BITS[bits])
            after = alive()
            measured = sum(size for place, size in after.items() if place not in before)
            told = pitome_vlm.describe(model)
            assert told.weights.total == measured
            output = model(**batch, use_cache=True)
            kept = output.past_key_values.layers
            cache = sum(layer.keys.nbytes + layer.values.nbytes for layer in kept)
            told = pitome_vlm.describe(model, text_tokens=output.logits.shape[1] - 16)
        assert told.after.kv_bytes == cache
        assert told.weights.total == measured
        assert told.weights.quantisation == {"none": "", "nf4": "nf4", "int8": "int8"}[bits]

    def test_four_bits_are_an_eighth_and_scales(self, checkpoint):
        loaded = {bits: load(checkpoint, dtype="float32", **BITS[bits])[0] for bits in BITS}
        sizes = {bits: weights_of(model) for bits, model in loaded.items()}
        plain, nf4, int8 = sizes["none"], sizes["nf4"], sizes["int8"]
        assert nf4.vision_tower == plain.vision_tower == int8.vision_tower
        assert nf4.projector == plain.projector
        assert nf4.language_model < int8.language_model < plain.language_model
        model = load(checkpoint)[0].model.language_model
        linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
        rest = plain.language_model - 4 * linear
        assert nf4.language_model - rest > linear / 2
        assert int8.language_model - rest > linear

    def test_text_and_json_say_it(self, checkpoint):
        model = load(checkpoint, tokens=16, load_in_4bit=True)[0]
        told = pitome_vlm.describe(model)
        assert "in nf4" in str(told)
        assert told.to_dict()["weights"]["total"] == weights_of(model).total
        assert told.to_dict()["weights"]["quantisation"] == "nf4"

    def test_adapters_weigh_too(self, checkpoint):
        from pitome_vlm.training import LoraOptions, prepare

        model = load(checkpoint, tokens=16, load_in_4bit=True)[0]
        before = weights_of(model)
        adapted = prepare(model, LoraOptions(rank=2))
        added = sum(p.nbytes for p in adapted.parameters() if p.requires_grad)
        assert weights_of(adapted).total == before.total + added


# --- everywhere alike


@pytest.mark.slow
def test_command_line_and_model_arguments(checkpoint, tmp_path):
    file = tmp_path / "a.png"
    Image.new("RGB", (120, 120), "red").save(file)
    for flag in ("--load-4bit", "--load-8bit"):
        words = ["ask", "-m", checkpoint, "-i", file, "--tokens", 16, flag, "what is it ?"]
        done = CliRunner().invoke(app, [str(word) for word in words])
        assert done.exit_code == 0, done.output
    arguments = ModelArguments.parse({"pretrained": str(checkpoint), "load_in_4bit": True})
    assert arguments.load_in_4bit


def test_a_model_saved_in_4_bits_comes_back(checkpoint, tmp_path):
    model, processor = load(checkpoint, tokens=16, load_in_4bit=True)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    edit_json(tmp_path / "tokenizer_config.json", model_input_names=["input_ids", "attention_mask"])
    again = load(tmp_path)[0]
    assert quantised_modules(again) == quantised_modules(model)
    batch = inputs(processor, model)
    assert torch.equal(again(**batch).logits, model(**batch).logits)
