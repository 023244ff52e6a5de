"""Plain encoders: exactness, counts and refusals on tiny random models of each kind.

A check loops over all of them and names those that fail.
"""

from __future__ import annotations

import dataclasses

import flash
import pytest
import torch
import transformers as hf
from tiny import tiny_model
from tiny_encoders import PATCH, PATCHES, SIDE, TINY

import pitome_vlm
from pitome_vlm.adapters.encoder_tower import EncoderPass
from pitome_vlm.adapters.encoders import ENCODERS, encoder_layers, find_encoder, leading_of
from pitome_vlm.adapters.layer_parts import ENCODER_LAYERS, parts_of, reach
from pitome_vlm.adapters.tower import encoding
from pitome_vlm.merge import algorithms
from pitome_vlm.wrapping.wrap import is_wrapped, merging_of, schedule_of

PARTS = 3


def every_encoder(check):
    """A test in several parts."""

    @pytest.mark.parametrize("part", range(PARTS))
    def test(part):
        failed = {}
        for name in list(TINY)[part::PARTS]:
            try:
                with torch.set_grad_enabled("gradient" in check.__name__):
                    check(TINY[name], TINY[name].model())
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {error}"
        assert not failed, "\n".join(f"{name}: {why}" for name, why in failed.items())

    return test


def run(tiny, model, inputs, **options):
    torch.manual_seed(5)  # of MAE's order of patches
    return tiny.result(model(**inputs, **options))


def image_features(tiny, model, inputs):
    found = model.get_image_features(pixel_values=inputs["pixel_values"])
    return found if isinstance(found, torch.Tensor) else found.pooler_output


def relative(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def classes(model):
    return [(name, type(module)) for name, module in model.named_modules()]


@every_encoder
def test_nothing_changes_without_merging_and_after(tiny, model):
    inputs, before, keys = tiny.inputs(), classes(model), list(model.state_dict())
    expected = run(tiny, model, inputs)
    pitome_vlm.wrap(model, keep=1.0)
    assert torch.equal(run(tiny, model, inputs), expected)
    pitome_vlm.wrap(model, ratio=0.9)
    assert list(model.state_dict()) == keys
    assert not torch.equal(run(tiny, model, inputs), expected)
    pitome_vlm.unwrap(model)
    assert torch.equal(run(tiny, model, inputs), expected)
    assert classes(model) == before
    assert list(model.state_dict()) == keys
    left = [key for part in model.modules() for key in vars(part) if key.startswith("_pitome")]
    assert not left


@every_encoder
def test_merging_nothing_equals_the_own_layers(tiny, model):
    inputs = tiny.inputs()
    expected = run(tiny, model, inputs)
    pitome_vlm.wrap(model, keep=1.0)
    base, merging = merging_of(model)
    whole = merging.plan(base).new_pass()
    steps = tuple((layer, PATCHES) for layer in range(whole.schedule.n_layers))
    schedule = dataclasses.replace(whole.schedule, tower=steps)
    merge_pass = EncoderPass.of(dataclasses.replace(whole, schedule=schedule))
    with encoding(find_encoder(model), merge_pass):
        found = run(tiny, model, inputs)
    assert set(merge_pass.plans) == set(range(4))
    assert relative(found, expected) < 1e-6


@every_encoder
def test_a_batch_equals_its_rows(tiny, model):
    inputs = tiny.inputs()
    if model.config.model_type == "vit_mae":
        inputs["noise"] = torch.rand(3, PATCHES)
    for options in ({"ratio": 0.9, "algorithm": "pitome"}, {"keep": 0.4}):
        pitome_vlm.wrap(model, **options)
        together = run(tiny, model, inputs)
        for index in range(3):
            row = tiny.row(inputs, index)
            if "noise" in inputs:
                row["noise"] = inputs["noise"][index : index + 1]
            assert relative(run(tiny, model, row)[0], together[index]) < 1e-4


def of_two_patches(pixels):
    """One patch all over the left half of every image, another one over the rest."""
    left, right = pixels[:1, :, :PATCH, :PATCH], pixels[1:2, :, :PATCH, :PATCH]
    times = SIDE // PATCH
    return torch.cat(
        [left.repeat(3, 1, times, times // 2), right.repeat(3, 1, times, times // 2)], 3
    )


@every_encoder
def test_duplicated_patches_are_exact_for_every_reader(tiny, model):
    model.double()
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        if "position_embedding" in name or "inv_freq" in name:
            weight.zero_()
    inputs = tiny.inputs()
    inputs["pixel_values"] = of_two_patches(inputs["pixel_values"].double())
    # The text towers of CLIP before release 5 cannot be run in float64.
    own = run if not hasattr(model, "text_model") else image_features
    expected = own(tiny, model, inputs)
    for options in ({"ratio": 0.85}, {"keep": 0.4}, {"ratio": 0.9, "placement": "after_layer"}):
        pitome_vlm.wrap(model, algorithm="tome", **options)
        assert schedule_of(model).tokens_out < PATCHES
        assert relative(own(tiny, model, inputs), expected) < 1e-9


@every_encoder
def test_layers_see_the_scheduled_counts(tiny, model):
    encoder, inputs, seen = find_encoder(model), tiny.inputs(), []
    assert leading_of(encoder) == tiny.leading
    for options in ({"ratio": 0.8}, {"tokens": 10}, {"keep": 0.5, "layers": (1, 3)}):
        pitome_vlm.wrap(model, **options)
        schedule, hooks = schedule_of(model), []
        for layer in encoder_layers(encoder):
            norm = reach(layer, parts_of(layer, ENCODER_LAYERS).norms[1])
            hooks.append(norm.register_forward_pre_hook(lambda _, x: seen.append(x[0].shape[1])))
        seen.clear()
        run(tiny, model, inputs)
        for hook in hooks:
            hook.remove()
        assert tuple(seen) == schedule.layer_lengths()
        assert schedule.tokens_in == PATCHES + tiny.leading
        short = pitome_vlm.encode_images(model, inputs["pixel_values"])
        assert short.counts == [schedule.tokens_out] * 3
        assert [int(sizes.sum()) for sizes in short.sizes()] == [schedule.tokens_in] * 3
    pitome_vlm.wrap(model, tokens=10)
    assert schedule_of(model).tokens_out == 10


@every_encoder
def test_ratio_merges_in_every_layer_and_a_total_in_every_other(tiny, model):
    pitome_vlm.wrap(model, ratio=0.9)
    assert [layer for layer, _ in schedule_of(model).tower] == [0, 1, 2, 3]
    counts = [PATCHES - int(PATCHES * (1 - 0.9) + 1e-9)]
    assert schedule_of(model).tower[0][1] == counts[0]
    pitome_vlm.wrap(model, keep=0.5)
    assert [layer for layer, _ in schedule_of(model).tower] == [0, 2]


@every_encoder
def test_gradients_reach_every_weight(tiny, model):
    encoder, inputs = find_encoder(model), tiny.inputs()
    pitome_vlm.wrap(model, ratio=0.8)
    inputs["pixel_values"].requires_grad_()
    model.train()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        inputs["pixel_values"].grad = None
        model.zero_grad()
        run(tiny, model, inputs).square().sum().backward()
        assert float(inputs["pixel_values"].grad.abs().sum()) > 0
        found.append({name: one.grad for name, one in encoder_layers(encoder).named_parameters()})
        assert all(grad is not None for grad in found[-1].values())
    for name, grad in found[0].items():
        assert torch.allclose(grad, found[1][name], rtol=1e-3, atol=1e-5), name


def test_text_towers_are_left_alone():
    for name, text in (("clip", "text_model"), ("siglip", "text_model"), ("blip", "text_encoder")):
        model, inputs = TINY[name].model(), TINY[name].inputs()
        before = classes(getattr(model, text))
        pitome_vlm.wrap(model, ratio=0.5)
        assert classes(getattr(model, text)) == before
        if name == "blip":
            continue
        words = {"input_ids": inputs["input_ids"]}
        with torch.no_grad():
            found = model.get_text_features(**words)
            pitome_vlm.unwrap(model)
            expected = model.get_text_features(**words)
        pairs = [one if isinstance(one, torch.Tensor) else one[1] for one in (found, expected)]
        assert torch.equal(*pairs)


def test_hidden_states_are_as_long_as_ever():
    for name in ("vit", "clip vision", "dinov2 registers", "dinov3", "siglip vision"):
        model, tiny = TINY[name].model(), TINY[name]
        length = PATCHES + tiny.leading
        pitome_vlm.wrap(model, ratio=0.8)
        with torch.no_grad():
            output = model(**tiny.inputs(), output_hidden_states=True)
            as_tuple = model(**tiny.inputs(), output_hidden_states=True, return_dict=False)
        assert len(output.hidden_states) == 5, name
        assert {state.shape[1] for state in output.hidden_states} == {length}, name
        # A group's patches have one value in common.
        assert len(output.hidden_states[-1][0].unique(dim=0)) == schedule_of(model).tokens_out
        last = next(one for one in as_tuple if isinstance(one, tuple))
        assert all(map(torch.equal, last, output.hidden_states)), name


def test_images_of_other_sizes():
    for name, more in (("dinov2", {}), ("vit", {"interpolate_pos_encoding": True}), ("dinov3", {})):
        model, tiny = TINY[name].model(), TINY[name]
        pitome_vlm.wrap(model, keep=0.5)
        with torch.no_grad():
            output = model(torch.randn(2, 3, 64, 32), **more)
        assert output.last_hidden_state.shape[1] == 32 + tiny.leading
        different = len(output.last_hidden_state[0].unique(dim=0))
        assert different == int(0.5 * (32 + tiny.leading) + 0.5), name


def test_the_default_pairs_by_similarity_alone():
    """In an encoder no energies are added: PiToMe without protection, on keys."""
    model, inputs = TINY["vit"].model(), TINY["vit"].inputs()
    found = []
    # No layer has to lose more than a quarter, which would take rounds.
    for options in ({}, {"algorithm": "pitome", "protect": False}):
        pitome_vlm.wrap(model, keep=0.6, **options)
        with torch.no_grad():
            found.append(model(**inputs).last_hidden_state)
        pitome_vlm.unwrap(model)
    assert torch.equal(*found)


def test_every_algorithm_that_works_inside_a_tower():
    model, inputs = TINY["vit"].model(), TINY["vit"].inputs()
    for name in algorithms.available():
        options = {"layers": (1,), "algorithm": name}
        if name == "none":
            continue
        pitome_vlm.wrap(model, keep=0.5, **options)
        with torch.no_grad():
            states = model(**inputs).last_hidden_state
        assert [len(one.unique(dim=0)) for one in states] == [19] * 3, name
        pitome_vlm.unwrap(model)
    with pytest.raises(ValueError, match="'pool' needs the whole patch grid"):
        pitome_vlm.wrap(TINY["mae"].model(), keep=0.5, algorithm="pool")


def test_what_is_refused():
    model = TINY["vit"].model()
    pixels = TINY["vit"].inputs()
    for options, match in (
        ({"keep": 0.5, "stage": "projector"}, "stage must be 'tower'"),
        ({"keep": "auto"}, "fixed budget"),
        ({"keep": 0.5, "size_bias": True}, "size_bias=True"),
        ({"keep": 0.5, "positions": "mean"}, "positions='mean'"),
        ({"tokens": 40}, "tokens must be in 1..37"),
        ({"tokens": 1}, "smallest count for this model is 2"),
    ):
        with pytest.raises(ValueError, match=match):
            pitome_vlm.wrap(model, **options)
        assert not is_wrapped(model)
    pitome_vlm.wrap(model, ratio=0.9)
    with pytest.raises(ValueError, match="output_attentions=True is not available"):
        model(**pixels, output_attentions=True)
    name = "attention_mask" if hasattr(model, "layers") else "head_mask"
    with pytest.raises(ValueError, match=f"{name} is not available"):
        model(**pixels, **{name: torch.ones(3, PATCHES + 1)})


def test_layers_merge_for_one_model_only():
    clip, llava = TINY["clip"].model(), tiny_model("clip")
    pitome_vlm.wrap(find_encoder(clip), ratio=0.9)
    with pytest.raises(ValueError, match="unwrap that first"):
        pitome_vlm.wrap(clip, ratio=0.9)
    assert not is_wrapped(clip)
    pitome_vlm.wrap(llava, keep=0.5)
    with pytest.raises(ValueError, match="unwrap that first"):
        pitome_vlm.wrap(llava.model.vision_tower, ratio=0.9)


def test_what_is_no_known_encoder_is_named():
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = hf.Siglip2VisionConfig(**size, intermediate_size=64, patch_size=8, num_patches=36)
    for model, why in (
        (hf.Siglip2VisionModel(vision), "NaFlex"),
        (hf.Dinov2Backbone(hf.Dinov2Config(**size, image_size=48, patch_size=8)), "backbone"),
        (hf.BertModel(hf.BertConfig(**size, intermediate_size=64)), "docs/models.md"),
        (tiny_model("clip").model, "pass the whole model"),
        (TINY["siglip"].build().text_model, "docs/models.md"),
        (torch.nn.Sequential(TINY["vit"].build()), r"wrap\(model.0, ...\)"),
        (type("Eva", (torch.nn.Module,), {"__module__": "timm.models.eva"})(), "timm's"),
    ):
        with pytest.raises(TypeError, match=why):
            pitome_vlm.wrap(model, ratio=0.9)


def test_every_record_is_tried():
    tried = {find_encoder(tiny.build()).config.model_type for tiny in TINY.values()}
    assert tried == {record.model_type for record in ENCODERS}
    for record in ENCODERS:
        assert all(hasattr(hf, name) for name in record.classes)


def test_kernels_agree(monkeypatch):
    flash.install(monkeypatch)
    for name in (
        "clip vision",
        "siglip vision",
        "vit",
        "deit",
        "dinov2 registers",
        "dinov3",
        "blip2",
    ):
        tiny, found = TINY[name], {}
        for kernel in ("eager", "sdpa", flash.NAME):
            model, inputs = tiny.model(attention="eager"), tiny.inputs()
            config = find_encoder(model).config
            config._attn_implementation_internal = kernel
            pitome_vlm.wrap(model, ratio=0.8, algorithm="tome")
            flash.widths.clear()
            with torch.no_grad():
                found[kernel] = tiny.result(model(**inputs))
            # Heads of 8 channels; after the first merge, sizes are in three more.
            assert set(flash.widths) == ({8, 16} if kernel == flash.NAME else set()), name
            pitome_vlm.unwrap(model)
        for kernel, result in found.items():
            assert relative(result, found["eager"]) < 1e-5, (name, kernel)


@every_encoder
def test_half_precision(tiny, model):
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        if "position_embedding" in name or "inv_freq" in name:
            weight.zero_()
    inputs = tiny.inputs()
    inputs["pixel_values"] = of_two_patches(inputs["pixel_values"])
    exact = run(tiny, model, inputs)
    model.bfloat16()
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    expected = run(tiny, model, inputs)
    pitome_vlm.wrap(model, ratio=0.85, algorithm="tome")
    found = run(tiny, model, inputs)
    assert found.dtype == expected.dtype == torch.bfloat16
    # About as near to float32 as without merging, where a last bit is 2 ** -7.
    assert relative(found.float(), exact) < 2 * relative(expected.float(), exact) + 2**-7
