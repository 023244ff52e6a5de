"""The original llava package: peft, training, files, numbers, and error messages."""

from __future__ import annotations

import copy
import json
import logging
import pickle

import pytest
import torch
import transformers
from original_llava import IMAGE, KINDS, PACKAGE, TOWER, original_batch, original_model
from peft import LoraConfig, PeftModel, get_peft_model
from test_original_calls import GREEDY, recomputed, rest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig
from typer.testing import CliRunner

import pitome_vlm
from pitome_vlm import MergeConfig
from pitome_vlm.adapters.tower import MergingLayer
from pitome_vlm.cli import app
from pitome_vlm.measure.accounting import costs
from pitome_vlm.measure.description import from_config
from pitome_vlm.measure.weights import weights_of
from pitome_vlm.releases import check_transformers
from pitome_vlm.wrapping.wrap import is_wrapped, merge_config

LORA = {"r": 4, "lora_alpha": 8, "init_lora_weights": False}
TARGETS = r"model\.layers.*(q_proj|k_proj|v_proj)"
TOWER_TOO = r".*(vision_tower.*|model\.layers.*)\.(q_proj|k_proj|v_proj)"


def lora(model, targets=TOWER_TOO, seed=0, **options):
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(target_modules=targets, **LORA, **options))


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_lora_before_or_after_wrapping_is_the_same(task):
    batch = original_batch(side="left")
    first = lora(pitome_vlm.wrap(original_model(), keep=0.25), task_type=task).eval()
    second = pitome_vlm.wrap(lora(original_model(), task_type=task), keep=0.25).eval()
    assert isinstance(second, PeftModel)
    logits = first(**batch).logits
    assert torch.equal(logits, second(**batch).logits)
    words = rest(batch)
    expected = recomputed(second, batch)
    assert torch.equal(first.generate(batch["input_ids"], **words, **GREEDY), expected)
    assert torch.equal(second.generate(batch["input_ids"], **words, **GREEDY), expected)
    with second.disable_adapter():
        plain = second(**batch).logits
    assert torch.equal(plain, pitome_vlm.wrap(original_model(), keep=0.25)(**batch).logits)
    assert not torch.equal(plain, logits)


def test_unwrapping_a_peft_model_leaves_the_peft_model():
    batch, model = original_batch(), lora(original_model()).eval()
    logits, keys = model(**batch).logits, list(model.state_dict())
    pitome_vlm.wrap(model, keep=0.25)
    assert list(model.state_dict()) == keys
    pitome_vlm.unwrap(model)
    assert torch.equal(model(**batch).logits, logits)
    assert not any(isinstance(module, MergingLayer) for module in model.modules())


def test_an_adapter_remembers_how_it_was_merged(tmp_path):
    batch = original_batch()
    model = pitome_vlm.wrap(lora(original_model(), TARGETS), keep=0.25).eval()
    logits = model(**batch).logits
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "pitome_config.json").read_text())["keep"] == 0.25
    base = pitome_vlm.wrap(original_model(), keep=0.25)
    again = PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(again(**batch).logits, logits)
    merged = again.merge_and_unload()
    assert is_wrapped(merged)
    torch.testing.assert_close(merged(**batch).logits, logits, atol=1e-2, rtol=1e-2)


def trained_gradients(model, batch, labels, checkpointing):
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        model.enable_input_require_grads()
    model.train()
    model(**batch, labels=labels).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", ["reentrant", "not reentrant"])
@pytest.mark.parametrize("stage", ["tower", "both"])
def test_checkpointing_changes_no_gradient(checkpointing, stage):
    batch = original_batch()
    labels = batch["input_ids"].masked_fill(batch["input_ids"] < 3, -100)
    found = []
    for mode in (None, checkpointing):
        model = pitome_vlm.wrap(original_model(), keep=0.25, stage=stage)
        found.append(trained_gradients(model, batch, labels, mode))
    assert found[0].keys() == found[1].keys()
    assert any("mm_projector" in name for name in found[0])
    # The package runs its tower without gradients.
    assert not any("vision_tower" in name for name in found[0])
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-5, rtol=1e-4)


def test_a_batch_of_text_still_reaches_the_projector():
    """As in the package, whose users train over many devices: no parameter is left out."""
    batch = original_batch(images=(0, 0), texts=(5, 9))
    model = pitome_vlm.wrap(original_model(), keep=0.25)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    for parameter in model.get_model().mm_projector.parameters():
        assert parameter.grad is not None
        assert not bool(parameter.grad.any())


def test_a_training_step_lowers_the_loss():
    batch = original_batch()
    labels = batch["input_ids"].masked_fill(batch["input_ids"] < 3, -100)
    model = pitome_vlm.wrap(original_model(), keep=0.25).train()
    model.get_vision_tower().requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(3):
        loss = model(**batch, labels=labels).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]


def test_saved_checkpoints_stay_plain_and_remember_the_settings(tmp_path):
    model = pitome_vlm.wrap(original_model(), keep=0.25)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "pitome_config.json").read_text())["keep"] == 0.25
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlavaLlamaForCausalLM"]
    assert not [name for name in config if "pitome" in name]


def test_copies_and_pickles_merge_on_their_own():
    model, batch = pitome_vlm.wrap(original_model(), keep=0.25), original_batch()
    logits = model(**batch).logits
    copied = copy.deepcopy(model)
    # transformers leaves hooks that cannot be pickled on a model that has recorded hidden states.
    again = pickle.loads(pickle.dumps(pitome_vlm.wrap(original_model(), keep=0.25)))
    pitome_vlm.unwrap(model)
    assert torch.equal(copied(**batch).logits, logits)
    assert torch.equal(again(**batch).logits, logits)


def test_repr_says_what_is_on():
    shown = repr(pitome_vlm.wrap(original_model(), keep=0.25))
    assert "pitome_plus keep=0.25, 144 -> 36 visual tokens per image" in shown


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_half_precision(dtype, attention):
    model = pitome_vlm.wrap(original_model(attention=attention).to(dtype), keep=0.25)
    batch = original_batch()
    batch["images"] = batch["images"].to(dtype)
    logits = model(**batch).logits
    assert logits.dtype == dtype
    assert bool(logits.isfinite().all())
    assert model.generate(batch["input_ids"], **rest(batch), **GREEDY).shape == (2, 5)


def test_eager_and_sdpa_agree():
    batch, found = original_batch(), []
    for attention in ("eager", "sdpa"):
        model = pitome_vlm.wrap(original_model(attention=attention), keep=0.25)
        shown = pitome_vlm.compact_inputs(model, **batch)["attention_mask"].bool()
        found.append(model(**batch).logits[shown])
    torch.testing.assert_close(*found, atol=1e-3, rtol=1e-3)


OPTIONS = {
    "nothing": {"keep": 1.0},
    "tower": {"keep": 0.25, "stage": "tower"},
    "projector": {"keep": 0.25, "stage": "projector"},
    "both": {"keep": 0.5, "stage": "both"},
    "random": {"keep": 0.25, "algorithm": "random"},
}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mpt"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_costs_agree_with_torch(kind, options):
    model, batch = original_model(kind), original_batch(images=(1,), texts=(5,))
    pitome_vlm.wrap(model, **options)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter, sdpa_kernel(SDPBackend.MATH):
        model(**batch)
    text = int((batch["input_ids"] != IMAGE).sum())
    assert costs(model, text_tokens=text).total_flops == pytest.approx(
        counter.get_total_flops(), rel=0.01
    )


@pytest.mark.parametrize("kind", KINDS)
def test_weights_add_up(kind):
    model = original_model(kind)
    found = weights_of(model)
    tensors = {t.data_ptr(): t.untyped_storage().nbytes() for t in model.parameters()}
    tensors |= {t.data_ptr(): t.untyped_storage().nbytes() for t in model.buffers()}
    assert found.total == sum(tensors.values())
    tower = model.get_vision_tower()
    both = [*tower.parameters(), *tower.buffers()]
    assert found.vision_tower == sum(t.untyped_storage().nbytes() for t in both)
    assert found.projector == sum(
        p.numel() * p.itemsize for p in model.get_model().mm_projector.parameters()
    )
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert found.other == (0 if tied else model.lm_head.weight.numel() * 4)


@pytest.mark.parametrize("kind", KINDS)
def test_describe_before_and_after_wrapping(kind):
    model = original_model(kind)
    plan = pitome_vlm.describe(model)
    assert str(plan).startswith("not switched on")
    told = pitome_vlm.describe(pitome_vlm.wrap(model, tokens=20))
    assert (told.tokens_in, told.tokens_out) == (144, 20)
    rotary = kind != "mpt"
    assert told.calibration.size_bias is rotary
    words = "log-size bias, mean" if rotary else "no size bias, compact"
    assert f"calibration of the language model: {words} positions" in str(told)
    json.dumps(told.to_dict())


def test_a_language_model_without_rotary_positions_says_so(caplog):
    model, batch = original_model("mpt"), original_batch()
    with pytest.raises(ValueError, match="no rotary"):
        pitome_vlm.wrap(model, keep=0.25, positions="mean")
    assert not is_wrapped(model)
    # Once per message and process.
    transformers.utils.logging.get_logger("x").warning_once.__func__.cache_clear()
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        pitome_vlm.wrap(model, keep=0.25)
    assert any("has no rotary" in record.message for record in caplog.records)
    assert "no size bias, compact positions" in str(pitome_vlm.describe(model))
    if PACKAGE:
        # The class of llava-torch 1.2.2.post1 hands its own preparation too few arguments.
        for ready in (model, original_model("mpt")):
            with pytest.raises(TypeError, match="missing 1 required positional argument"):
                ready(**batch)
        return
    new = model.generate(batch["input_ids"], **rest(batch), **GREEDY)
    assert torch.equal(new, recomputed(model, batch))


def test_a_tower_that_is_not_loaded_yet_is_asked_for():
    model = original_model(loaded=False)
    assert not model.get_vision_tower().is_loaded
    for call in (pitome_vlm.wrap, pitome_vlm.describe):
        with pytest.raises(ValueError, match=r"not loaded yet.*load_model\(\)"):
            call(model, **({"keep": 0.25} if call is pitome_vlm.wrap else {}))
    assert not is_wrapped(model)
    model.get_vision_tower().load_model()
    pitome_vlm.wrap(model, keep=0.25)
    assert model(**original_batch()).logits.isfinite().all()


def test_a_model_without_a_tower_says_so():
    model = original_model()
    model.get_model().vision_tower = None
    with pytest.raises(ValueError, match="no vision tower"):
        pitome_vlm.wrap(model, keep=0.25)


def test_a_tower_in_a_list_as_fsdp_has_it():
    model, batch = original_model(), original_batch()
    expected = pitome_vlm.wrap(original_model(), keep=0.25)(**batch).logits
    core = model.get_model()
    tower = core.vision_tower
    del core.vision_tower
    core.vision_tower = [tower]
    pitome_vlm.wrap(model, keep=0.25)
    assert torch.equal(model(**batch).logits, expected)


def test_a_tower_that_was_replaced_is_noticed():
    model, batch = pitome_vlm.wrap(original_model(), keep=0.25), original_batch()
    model.get_vision_tower().vision_tower = original_model().get_vision_tower().vision_tower
    with pytest.raises(RuntimeError, match=r"replaced after wrap"):
        model(**batch)


def test_an_unknown_tower_merges_at_the_projector_only():
    model, batch = original_model(), original_batch()
    for layer in model.get_vision_tower().modules():
        if hasattr(layer, "layer_norm1"):
            layer.norm_of_another_name, layer.layer_norm1 = layer.layer_norm1, None
            del layer.layer_norm1
    with pytest.raises(TypeError, match='stage="projector"'):
        pitome_vlm.wrap(model, keep=0.25, stage="tower")
    pitome_vlm.wrap(model, keep=0.25, stage="projector")
    assert merge_config(model).stage == "projector"
    del batch


def test_missing_images_are_counted():
    model, batch = pitome_vlm.wrap(original_model(), keep=0.25), original_batch()
    with pytest.raises(ValueError, match=r"3 image placeholders, so 3 images are needed, got 2"):
        model(**batch | {"images": batch["images"][:2]})
    batch = original_batch(images=(1, 0))
    with pytest.raises(ValueError, match=r"1 of its rows none .*so 2 images are needed, got 1"):
        model(**batch | {"images": batch["images"][:1]})


def test_a_mask_of_another_shape_is_refused():
    model, batch = pitome_vlm.wrap(original_model(), keep=0.25), original_batch()
    with pytest.raises(ValueError, match=r"attention_mask must be \[batch, tokens\].*\(2, 18\)"):
        model(**batch | {"attention_mask": torch.ones(2, 3)})


def test_features_read_in_an_unknown_way_are_refused():
    for name, value, words in (
        ("select_layer", [-2, -5], "select_layer"),
        ("select_feature", "cls", "mm_vision_select_feature must be one of patch, cls_patch"),
        ("num_patches", 7, "it makes 7 patches"),
    ):
        model = original_model()
        tower = model.get_vision_tower()
        if name == "num_patches":
            tower.__class__ = type("Other", (type(tower),), {"num_patches": 7})
        else:
            setattr(tower, name, value)
        with pytest.raises((TypeError, ValueError), match=words):
            pitome_vlm.wrap(model, keep=0.25)
        assert not is_wrapped(model)


def test_a_fork_that_resamples_is_refused_and_one_with_helpers_is_not():
    """Forks pool tiles and split the preparation up; only moving tokens about can be followed."""
    base = type(original_model())

    class Halves(base):
        def prepare_inputs_labels_for_multimodal(
            self, input_ids, position_ids, attention_mask, past_key_values, labels, images, *rest
        ):
            values = base.prepare_inputs_labels_for_multimodal(
                self, input_ids, position_ids, attention_mask, past_key_values, labels, images
            )
            return (*values[:4], self.smoothed(values[4]), values[5])

        def smoothed(self, embeds):
            return (embeds + embeds.roll(1, 1)) / 2

    class Helpers(base):
        def prepare_inputs_labels_for_multimodal(
            self, input_ids, position_ids, attention_mask, past_key_values, labels, images, *rest
        ):
            given = (input_ids, position_ids, attention_mask, past_key_values, labels, images)
            return self.helper(*given)

        def helper(self, *given):
            return base.prepare_inputs_labels_for_multimodal(self, *given)

        def encode_images(self, images):
            return base.encode_images(self, images)

    model, batch = original_model(), original_batch()
    model.__class__ = Halves
    pitome_vlm.wrap(model, keep=0.25)
    with pytest.raises(ValueError, match=r"does more with visual tokens.*mm_patch_merge_type"):
        model(**batch)
    helped = original_model()
    helped.__class__ = Helpers
    pitome_vlm.wrap(helped, keep=0.25)
    expected = pitome_vlm.wrap(original_model(), keep=0.25)(**batch).logits
    assert torch.equal(helped(**batch).logits, expected)


def saved_config(folder, **options):
    """A checkpoint's config.json as the package writes it, and a folder with its tower's."""
    tower = folder / "tower"
    CLIPVisionConfig(**TOWER).save_pretrained(tower)
    model = original_model(**options)
    model.config.mm_vision_tower = str(tower)
    model.config.save_pretrained(folder)
    found = json.loads((folder / "config.json").read_text())
    found["model_type"] = "llava_llama"
    (folder / "config.json").write_text(json.dumps(found))
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mm_vision_select_feature": "cls_patch"},
        {"mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres"},
    ],
    ids=["flat", "cls_patch", "spatial_unpad"],
)
def test_a_checkpoint_is_described_without_weights_and_without_the_package(options, tmp_path):
    model = saved_config(tmp_path, **options)
    merging = MergeConfig(keep=0.25)
    for size in (None, (480, 640), (30, 1000), (1000, 30), (96, 96)):
        found = from_config(tmp_path, merging, image_size=size)
        told = pitome_vlm.describe(model, config=merging, image_size=size)
        assert (found.tokens_in, found.tokens_out) == (told.tokens_in, told.tokens_out)
        assert found.tower_steps == told.tower_steps
        for field in ("tower_flops", "projector_flops", "kv_bytes"):
            assert getattr(found.after, field) == getattr(told.after, field), field
        # transformers computes the logits of one position, the package of all.
        logits = 2 * model.lm_head.weight.numel() * (told.after.prompt_tokens - 1)
        assert found.after.prefill_flops == told.after.prefill_flops - logits
        assert found.weights.total == told.weights.total


def test_info_on_the_command_line(tmp_path):
    saved_config(tmp_path)
    result = CliRunner().invoke(app, ["info", "--model", str(tmp_path), "--keep", "0.25"])
    assert result.exit_code == 0, result.output
    assert "144 -> 36 visual tokens per image" in result.output


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mm_vision_tower": "/nowhere/clip"}, "'/nowhere/clip' as its vision tower"),
        ({"mm_projector_type": "ldpnet"}, "mm_projector_type must be linear"),
        ({"mm_vision_select_feature": "cls"}, "mm_vision_select_feature one of patch"),
        ({"mm_vision_select_layer": [-2, -5]}, "mm_vision_select_layer must be a number"),
        ({"model_type": "llava_gemma"}, "model_type 'llava_gemma'"),
        (
            {
                "mm_patch_merge_type": "spatial_unpad",
                "image_aspect_ratio": "anyres",
                "image_grid_pinpoints": "[(1, 2",
            },
            "image_grid_pinpoints must be",
        ),
    ],
)
def test_a_checkpoint_that_cannot_be_described_says_why(change, words, tmp_path):
    saved_config(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | change))
    with pytest.raises((OSError, TypeError, ValueError), match=words):
        from_config(tmp_path)


def test_loading_such_a_checkpoint_points_to_the_package(tmp_path):
    saved_config(tmp_path)
    with pytest.raises(TypeError, match=r"original llava package.*wrap\(\) the model"):
        pitome_vlm.load(tmp_path)


def test_releases_that_are_too_old_are_named():
    for version in ("4.37.2", "4.56.9", "3.0"):
        with pytest.raises(ImportError, match=rf"4\.57 or later, found {version}.*masking_utils"):
            check_transformers(version)
    for fine in ("4.57.0", "5.0.0rc1", "5.24.0", "6.0"):
        check_transformers(fine)
