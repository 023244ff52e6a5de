"""Merging together with peft, accelerate, save_pretrained, Trainer's inspection, other dtypes."""

from __future__ import annotations

import inspect
import json

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_batch, tiny_model
from transformers import LlavaForConditionalGeneration

import pitome_vlm
from pitome_vlm.adapters.tower import MergingLayer
from pitome_vlm.wrapping.wrap import is_wrapped, merge_config, schedule_of

GREEDY = {"max_new_tokens": 5, "do_sample": False}
LORA = {"r": 4, "lora_alpha": 8, "init_lora_weights": False}
TARGETS = r".*(vision_tower|language_model).*\.(q_proj|k_proj|v_proj)"


def lora(model, seed=0):
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(target_modules=TARGETS, **LORA))


def test_lora_before_or_after_wrapping_is_the_same():
    batch = tiny_batch()
    first = lora(pitome_vlm.wrap(tiny_model(), keep=0.25)).eval()
    second = pitome_vlm.wrap(lora(tiny_model()), keep=0.25).eval()
    assert isinstance(second, PeftModel)
    logits = first(**batch).logits
    assert logits.shape[1] < batch["input_ids"].shape[1]
    assert torch.equal(logits, second(**batch).logits)
    assert torch.equal(first.generate(**batch, **GREEDY), second.generate(**batch, **GREEDY))
    with second.disable_adapter():
        plain = second(**batch).logits
    assert torch.equal(plain, pitome_vlm.wrap(tiny_model(), keep=0.25)(**batch).logits)
    assert not torch.equal(plain, logits)  # keys of the tower carry the adapter


def test_unwrapping_a_peft_model_leaves_the_peft_model():
    batch, model = tiny_batch(), lora(tiny_model()).eval()
    logits, keys = model(**batch).logits, list(model.state_dict())
    pitome_vlm.wrap(model, keep=0.25)
    assert is_wrapped(model)
    assert list(model.state_dict()) == keys
    pitome_vlm.unwrap(model)
    assert torch.equal(model(**batch).logits, logits)


def test_adapter_round_trip_and_merge_keep_the_wrapping(tmp_path):
    # In float64: which tokens merge is a discontinuous choice, and the rounding of merged float32
    # weights is enough to turn a near tie.
    def base():
        return pitome_vlm.wrap(tiny_model().double(), keep=0.25)

    batch, model = tiny_batch(), lora(base()).double().eval()
    batch["pixel_values"] = batch["pixel_values"].double()
    logits = model(**batch).logits
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path, autocast_adapter_dtype=False)
    assert torch.equal(again.double().eval()(**batch).logits, logits)
    merged = again.merge_and_unload()
    assert is_wrapped(merged)
    torch.testing.assert_close(merged(**batch).logits, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("wrap_first", [True, False])
def test_a_tower_that_peft_trains_as_a_copy_merges_too(wrap_first):
    config = LoraConfig(
        target_modules=r".*language_model.*q_proj", modules_to_save=["vision_tower"], **LORA
    )
    model, batch = tiny_model(), tiny_batch()
    torch.manual_seed(0)
    if wrap_first:
        peft_model = get_peft_model(pitome_vlm.wrap(model, keep=0.25), config).eval()
    else:
        peft_model = pitome_vlm.wrap(get_peft_model(model, config), keep=0.25).eval()
    assert peft_model(**batch).logits.shape[1] == batch["input_ids"].shape[1] - 2 * (144 - 36)
    pitome_vlm.unwrap(peft_model)
    assert peft_model(**batch).logits.shape[1] == batch["input_ids"].shape[1]
    assert not any(isinstance(module, MergingLayer) for module in peft_model.modules())


def test_the_trainer_trains_and_evaluates(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = pitome_vlm.wrap(tiny_model(), keep=0.25)
    row = {k: v[0] for k, v in tiny_batch(images=(1,), texts=(6,)).items()}
    row["labels"] = row["input_ids"].masked_fill(row["input_ids"] == 99, -100)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        max_steps=3,
        learning_rate=5e-3,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        bf16=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=[row] * 6,
        eval_dataset=[row] * 2,
        data_collator=lambda rows: {k: torch.stack([r[k] for r in rows]) for k in rows[0]},
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before


@pytest.mark.parametrize(
    "options",
    [
        {"layers": (1,), "stage": "projector"},
        {"projector_steps": 3, "stage": "tower"},
        {"layers": ()},
    ],
    ids=str,
)
def test_options_without_effect_are_refused(options):
    with pytest.raises(ValueError, match=r"has no effect at stage=|layers is empty"):
        pitome_vlm.wrap(tiny_model(), keep=0.25, **options)


def test_save_pretrained_by_position(tmp_path):
    model = pitome_vlm.wrap(tiny_model(), keep=0.25)
    model.save_pretrained(tmp_path / "other_rank", False)
    assert not (tmp_path / "other_rank" / "pitome_config.json").exists()
    model.save_pretrained(tmp_path / "main", True)
    assert (tmp_path / "main" / "pitome_config.json").exists()


@pytest.mark.parametrize("hook", ["dispatch", "offload"])
@pytest.mark.parametrize("hook_first", [True, False])
def test_accelerate_hooks_before_or_after(hook, hook_first):
    batch, model = tiny_batch(), tiny_model()
    expected = pitome_vlm.wrap(tiny_model(), keep=0.25)(**batch).logits

    def attach():
        if hook == "dispatch":
            dispatch_model(model, {"": "cpu"}, force_hooks=True)
        else:
            cpu_offload(model, execution_device=torch.device("cpu"))

    if hook_first:
        attach()
        pitome_vlm.wrap(model, keep=0.25)
    else:
        pitome_vlm.wrap(model, keep=0.25)
        attach()
    assert torch.equal(model(**batch).logits, expected)
    assert model.generate(**batch, **GREEDY).shape[1] == batch["input_ids"].shape[1] + 5
    pitome_vlm.unwrap(model)
    unmerged = model(**batch).logits
    assert torch.equal(unmerged, tiny_model()(**batch).logits)
    remove_hook_from_submodules(model)
    assert torch.equal(model(**batch).logits, unmerged)


def test_saved_checkpoints_stay_plain_and_remember_the_settings(tmp_path):
    batch, model = tiny_batch(), pitome_vlm.wrap(tiny_model(), tokens=30, algorithm="tome")
    logits = model(**batch).logits
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert not is_wrapped(loaded)
    settings = pitome_vlm.MergeConfig.from_pretrained(tmp_path)
    assert settings == merge_config(model)
    assert torch.equal(pitome_vlm.wrap(loaded, config=settings)(**batch).logits, logits)


def test_signatures_are_the_model_s_own():
    plain, wrapped = tiny_model(), pitome_vlm.wrap(tiny_model(), keep=0.25)
    for name in ("forward", "generate"):
        assert inspect.signature(getattr(wrapped, name)) == inspect.signature(getattr(plain, name))
    assert type(wrapped).__name__ == "LlavaForConditionalGeneration"
    assert isinstance(wrapped, LlavaForConditionalGeneration)


def test_repr_says_what_is_on():
    model = pitome_vlm.wrap(tiny_model(), keep=0.25, energy="elu")
    assert "pitome_plus keep=0.25 energy=elu, 144 -> 36 visual tokens per image" in repr(model)
    assert "pitome layer 2" in repr(model)
    assert "pitome" not in repr(pitome_vlm.unwrap(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_half_precision(dtype, attention):
    model = pitome_vlm.wrap(tiny_model(attention=attention).to(dtype), keep=0.25)
    batch = tiny_batch()
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    logits = model(**batch).logits
    assert logits.dtype == dtype
    assert bool(logits.isfinite().all())


def test_sdpa_and_eager_merge_alike():
    batch = tiny_batch(images=(2, 2), texts=(4, 4))
    sdpa = pitome_vlm.wrap(tiny_model(), keep=0.5)(**batch).logits
    eager = pitome_vlm.wrap(tiny_model(attention="eager"), keep=0.5)(**batch).logits
    torch.testing.assert_close(sdpa, eager, atol=1e-3, rtol=1e-3)


def test_feature_options_of_a_single_call():
    model, batch = pitome_vlm.wrap(tiny_model(), tokens=30), tiny_batch(images=(1,), texts=(4,))
    default = model(**batch).logits
    deeper = model(**batch, vision_feature_layer=-3).logits
    assert deeper.shape == default.shape
    assert not torch.equal(deeper, default)
    ids = torch.cat([batch["input_ids"][:, :5], batch["input_ids"][:, 4:]], 1)  # one more: CLS
    full = model(
        input_ids=ids,
        pixel_values=batch["pixel_values"],
        vision_feature_select_strategy="full",
    ).logits
    assert full.shape[1] == default.shape[1]
    assert schedule_of(model).tokens_in == 144


def test_an_unknown_tower_merges_at_the_projector_only():
    model, batch = tiny_model(), tiny_batch()
    for module in model.modules():
        if hasattr(module, "layer_norm1"):
            as_tuple = "output_attentions" in inspect.signature(module.forward).parameters
            del module.layer_norm1
            module.forward = lambda x, *_, as_tuple=as_tuple, **__: (x,) if as_tuple else x
    with pytest.raises(TypeError, match=r"looked for a ModuleList.*stage=\"projector\""):
        pitome_vlm.wrap(model, keep=0.25)
    assert not is_wrapped(model)
    pitome_vlm.wrap(model, keep=0.25, stage="projector")
    assert pitome_vlm.encode_images(model, batch["pixel_values"]).counts == [36] * 3
    pitome_vlm.unwrap(model)


def test_two_threads_share_a_model():
    from concurrent.futures import ThreadPoolExecutor

    model = pitome_vlm.wrap(tiny_model(), keep=0.25)
    batches = [tiny_batch(images=(1,), texts=(4,), seed=seed) for seed in range(8)]
    alone = [model(**batch).logits for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda batch: model(**batch).logits, batches * 3))
    for index, logits in enumerate(together):
        torch.testing.assert_close(logits, alone[index % 8])
