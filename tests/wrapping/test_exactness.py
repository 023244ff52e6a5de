"""What must not change: keep=1.0, unwrap, other models; and what merging must equal."""

from __future__ import annotations

import copy
import gc
import io

import pytest
import torch
from tiny import KINDS, duplicated_image, tiny_batch, tiny_model, tokens_per_image

import pitome_vlm
from pitome_vlm import MergeConfig
from pitome_vlm.adapters.tower import find_encoder_layers
from pitome_vlm.merge import algorithms
from pitome_vlm.wrapping.encode import encode_images, planned_schedule
from pitome_vlm.wrapping.wrap import is_wrapped, schedule_of

BUDGETS = [{"keep": 0.5}, {"keep": 0.1}, {"tokens": 37}, {"tokens": 2}, {"ratio": 0.9}]
GREEDY = {"max_new_tokens": 6, "do_sample": False}


def snapshot(model):
    """Everything a wrap could leave on a model's modules.

    Taken after a forward pass of the unwrapped model: transformers installs its own recording
    hooks on the first one.
    """
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")

    def attributes(module):
        # transformers 4.57 leaves the class's own forward on instances; it means nothing.
        own = getattr(module.__dict__.get("forward"), "__func__", None) is type(module).forward
        return sorted(name for name in module.__dict__ if not (own and name == "forward"))

    return [
        (name, type(module), attributes(module), [len(getattr(module, hook)) for hook in hooks])
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_keep_one_is_bit_identical(kind):
    model, batch = tiny_model(kind), tiny_batch(kind)
    logits = model(**batch).logits
    greedy = model.generate(**batch, **GREEDY)
    beams = model.generate(**batch, num_beams=3, max_new_tokens=5)
    pitome_vlm.wrap(model, keep=1.0)
    assert torch.equal(model(**batch).logits, logits)
    assert torch.equal(model.generate(**batch, **GREEDY), greedy)
    assert torch.equal(model.generate(**batch, num_beams=3, max_new_tokens=5), beams)


@pytest.mark.parametrize("kind", KINDS)
def test_unwrap_leaves_nothing(kind):
    model, batch = tiny_model(kind), tiny_batch(kind)
    logits, keys = model(**batch).logits, list(model.state_dict())
    before = snapshot(model)
    pitome_vlm.wrap(model, keep=0.25)
    assert list(model.state_dict()) == keys
    assert model(**batch).logits.shape != logits.shape
    assert type(model).__name__ in (
        "LlavaForConditionalGeneration",
        "VipLlavaForConditionalGeneration",
    )
    pitome_vlm.unwrap(model)
    assert snapshot(model) == before
    assert torch.equal(model(**batch).logits, logits)
    assert pitome_vlm.unwrap(model) is model  # twice is no error


def test_another_model_is_untouched():
    wrapped, other = tiny_model(), tiny_model()
    batch = tiny_batch()
    logits, before = other(**batch).logits, snapshot(other)
    pitome_vlm.wrap(wrapped, keep=0.25)
    wrapped(**batch)
    assert snapshot(other) == before
    assert torch.equal(other(**batch).logits, logits)


def test_wrapping_twice_is_wrapping_once_with_the_last_settings():
    model, once, batch = tiny_model(), tiny_model(), tiny_batch()
    model(**batch)
    once(**batch)
    plain = snapshot(model)
    pitome_vlm.wrap(pitome_vlm.wrap(model, keep=0.5), tokens=30, algorithm="tome")
    pitome_vlm.wrap(once, tokens=30, algorithm="tome")
    assert snapshot(model) == snapshot(once)
    assert torch.equal(model(**batch).logits, once(**batch).logits)
    assert snapshot(pitome_vlm.unwrap(model)) == plain


def test_context_manager_restores_after_an_error_and_nests():
    model, plain = tiny_model(), snapshot(tiny_model())

    def fail_inside():
        with pitome_vlm.wrapped(model, keep=0.5):
            assert schedule_of(model).tokens_out == 72
            with pitome_vlm.wrapped(model, tokens=10):
                assert schedule_of(model).tokens_out == 10
            assert schedule_of(model).tokens_out == 72
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert snapshot(model) == plain


EVERYWHERE = ("pitome", "tome", "random", "pool")
# The others share the code of those; each in its own place, on the kinds that differ most.
PLACES = [(name, stage, KINDS) for name in EVERYWHERE for stage in ("tower", "projector", "both")]
PLACES += [
    (name, algorithms.get(name).default_stage, ("clip_full", "siglip_default", "clip_list"))
    for name in algorithms.available()
    if name not in (*EVERYWHERE, "none")
]


@pytest.mark.parametrize(
    ("algorithm", "stage", "kind"), [(*place, kind) for *place, kinds in PLACES for kind in kinds]
)
def test_predicted_counts_are_observed_counts(algorithm, stage, kind):
    model, batch = tiny_model(kind), tiny_batch(kind)
    for budget in BUDGETS:
        config = MergeConfig(**budget, algorithm=algorithm, stage=stage)
        refused = algorithm == "pool" and (stage == "both" or kind == "siglip_default")
        if refused:
            with pytest.raises(ValueError, match="pool"):
                pitome_vlm.wrap(model, config=config)
            continue
        expected = planned_schedule(model, config)
        pitome_vlm.wrap(model, config=config)
        visual = encode_images(model, batch["pixel_values"])
        assert visual.counts == [expected.tokens_out] * 3
        assert visual.full_counts == [tokens_per_image(kind)] * 3
        for sizes, positions in zip(visual.sizes(), visual.positions("mean"), strict=True):
            assert sizes.sum() == tokens_per_image(kind)
            assert bool((sizes > 0).all())
            assert bool(((positions >= 0) & (positions < tokens_per_image(kind))).all())
        removed = 2 * (tokens_per_image(kind) - expected.tokens_out)
        logits = model(**batch).logits
        assert logits.shape[1] == batch["input_ids"].shape[1] - removed
        assert bool(logits.isfinite().all())


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("algorithm", ["pitome", "tome", "tofu", "divprune"])
def test_merging_exact_duplicates_equals_not_merging(kind, attention, algorithm):
    model = tiny_model(kind, attention=attention)
    pixels = duplicated_image(model)
    pitome_vlm.wrap(model, keep=1.0)
    full = encode_images(model, pixels).features[0]
    options = {"algorithm": algorithm, "stage": "tower", "layers": (1,)}
    pitome_vlm.wrap(model, tokens=72, **options, proportional_attention=True)
    merged = encode_images(model, pixels)
    assert merged.sizes()[0].tolist() == [2.0] * 72
    spread = merged.features[0][merged.source_maps[0]]
    assert (spread - full).abs().max() <= 1e-5 * full.abs().max().clamp(min=1)
    # Without log(size) the merged tokens would weigh half: the oracle must be able to fail.
    pitome_vlm.wrap(model, tokens=72, **options, proportional_attention=False)
    unweighted = encode_images(model, pixels)
    spread = unweighted.features[0][unweighted.source_maps[0]]
    # (in SigLIP all groups are equally large, so that a missing weight changes nothing; groups of
    # different sizes are in test_tower_reference.py)
    assert ((spread - full).abs().max() > 1e-3) == (kind == "clip")


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_pickles_are_independent(kind):
    model, batch = pitome_vlm.wrap(tiny_model(kind), keep=0.25), tiny_batch(kind)
    # Before the first forward pass: the recording hooks that transformers installs then make
    # even an unwrapped model unpicklable.
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    logits = model(**batch).logits
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for other in (twin, loaded):
        assert is_wrapped(other)
        assert torch.equal(other(**batch).logits, logits)
    pitome_vlm.unwrap(twin)
    assert is_wrapped(loaded)
    assert is_wrapped(model)


def test_layers_after_the_features_are_not_run():
    model, batch = tiny_model(), tiny_batch()
    ran = []
    for index, layer in enumerate(find_encoder_layers(model.model.vision_tower)[0]):
        layer.mlp.register_forward_hook(lambda *_, index=index: ran.append(index))
    with pitome_vlm.wrapped(model, keep=0.5):
        model(**batch)
        assert ran == [0, 1, 2, 3, 4]
        ran.clear()
        with pitome_vlm.wrapped(model, keep=0.5, stage="projector"):
            model(**batch)
        assert ran == [0, 1, 2, 3, 4]
    ran.clear()
    model(**batch)
    assert ran == [0, 1, 2, 3, 4, 5]


def test_the_tower_on_its_own_stays_the_tower():
    model, batch = tiny_model(), tiny_batch()
    alone = model.model.vision_tower(batch["pixel_values"]).last_hidden_state
    pitome_vlm.wrap(model, keep=0.25)
    assert torch.equal(model.model.vision_tower(batch["pixel_values"]).last_hidden_state, alone)


def test_released_recipe_gives_the_language_model_another_order():
    model, batch = tiny_model(), tiny_batch()
    config = MergeConfig.preset("released", tokens=40)
    scrambled = encode_images(pitome_vlm.wrap(model, config=config), batch["pixel_values"])
    ordered = encode_images(
        pitome_vlm.wrap(model, config=config, restore_order=True), batch["pixel_values"]
    )
    for a, b in zip(scrambled.features, ordered.features, strict=True):
        torch.testing.assert_close(a.sort(0).values, b.sort(0).values, atol=1e-4, rtol=1e-4)
    for a, b in zip(scrambled.positions("mean"), ordered.positions("mean"), strict=True):
        assert (a.diff() < 0).sum() > (b.diff() < 0).sum()  # backward jumps across the image


def test_a_failed_wrap_changes_nothing():
    model, batch = tiny_model(), tiny_batch()
    logits, before = model(**batch).logits, snapshot(model)
    for bad in (
        {"keep": 2.0},
        {"keep": 0.5, "algorithm": "pitomee"},
        {"keep": 0.5, "layers": (77,)},
        {"tokens": 1000},
        {"keep": 0.5, "margn": 0.1},
    ):
        with pytest.raises(ValueError, match=r"keep|algorithm|layers|tokens|margn"):
            pitome_vlm.wrap(model, **bad)
        assert snapshot(model) == before
    model.forward = lambda *args, **kwargs: None  # someone else's patch
    with pytest.raises(RuntimeError, match="replaced on this instance"):
        pitome_vlm.wrap(model, keep=0.5)
    del model.forward
    assert snapshot(model) == before
    assert torch.equal(model(**batch).logits, logits)


@pytest.mark.parametrize("thing", [torch.nn.Linear(2, 2), None, "llava", {}])
def test_something_else_is_a_type_error(thing):
    with pytest.raises(TypeError, match=r"cannot wrap .*LlavaForConditionalGeneration"):
        pitome_vlm.wrap(thing, keep=0.5)


def test_a_wrapped_model_can_be_collected():
    model = pitome_vlm.wrap(tiny_model(), keep=0.25)
    model(**tiny_batch())
    import weakref

    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
