"""Calibration under kernels that take no mask equals calibration by the mask.

transformers' own code for flash kernels runs, on kernels written in Python (`support/flash.py`).
"""

from __future__ import annotations

import copy
import pickle

import flash
import pytest
import torch
from families import IMAGE_FAMILIES
from tiny import IMAGE, PATCHES, tiny_batch, tiny_model
from transformers import (
    DynamicCache,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
)
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import pitome_vlm
from pitome_vlm.demo.dataset import load_split
from pitome_vlm.measure.demo_benchmark import Setting, run
from pitome_vlm.merge.config import MergeConfig
from pitome_vlm.releases import CACHE_NAME
from pitome_vlm.wrapping.wrap import is_wrapped

HEAD, WIDE = 8, 16
GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    flash.install(monkeypatch)


def both(make=tiny_model, **options):
    """The same model twice, wrapped: calibrated by the mask and by channels."""
    models = []
    for name in ("sdpa", flash.NAME):
        model = flash.use(make().double(), name)
        models.append(pitome_vlm.wrap(model, **{"keep": 0.25} | options))
    return models


def doubled(batch):
    return {n: v.double() if torch.is_floating_point(v) else v for n, v in batch.items()}


def close(found, expected):
    # Norms compute in float32 whatever goes in, which may turn the last bit of it.
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_channels_equal_the_mask(family):
    options = [{}]
    if family is IMAGE_FAMILIES[0]:
        options += [{"positions": "original"}, {"positions": "compact", "size_bias": True}]
        options += [{"positions": "mean", "size_bias": False}]
    for own in options:
        by_mask, by_channels = both(lambda: family()[0], **own)
        batch = doubled(family()[1])
        flash.widths.clear()
        with torch.no_grad():
            prompts = [
                pitome_vlm.compact_inputs(model, **batch)["attention_mask"] != 0
                for model in (by_mask, by_channels)
            ]
            found = [model(**batch).logits for model in (by_mask, by_channels)]
            close(found[1][prompts[1]], found[0][prompts[0]])
            more = GREEDY | {"return_dict_in_generate": True, "output_logits": True}
            answers = [model.generate(**batch, **more) for model in (by_mask, by_channels)]
        assert torch.equal(answers[0].sequences, answers[1].sequences)
        close(torch.stack(answers[1].logits), torch.stack(answers[0].logits))
        bias = own.get("size_bias", True)
        head = by_mask.config.get_text_config().hidden_size // 4
        assert set(flash.widths) == {head + 8 if bias else head}


def test_every_way_to_decode_equals_the_mask():
    models, batch = both(), doubled(tiny_batch())
    row = doubled(tiny_batch(images=(2,), texts=(5,)))
    for given, more in (
        (batch, {"num_beams": 3}),
        (batch, {"num_beams": 2, "num_return_sequences": 2}),
        (batch, {"cache_implementation": "static"}),
        (batch, {"use_cache": False}),
        (row, {"prompt_lookup_num_tokens": 2, "eos_token_id": 127}),
        (row, {"cache_implementation": "static"}),
        (doubled(tiny_batch(side="right", images=(1, 1), texts=(4, 4))), {}),
    ):
        found = [model.generate(**given, **GREEDY, **more) for model in models]
        assert torch.equal(*found), more


def test_what_is_not_merged_costs_nothing():
    bare, batch = flash.use(tiny_model()), tiny_batch()
    words = tiny_batch(images=(0, 0))
    with torch.no_grad():
        expected = [bare(**one).logits for one in (words, batch)]
        pitome_vlm.wrap(bare, keep=0.25)
        assert torch.equal(bare(**words).logits, expected[0])
        pitome_vlm.wrap(bare, keep=1.0)
        assert torch.equal(bare(**batch).logits, expected[1])
    assert set(flash.widths) == {HEAD}


def mistral(window=30):
    """A LLaVA whose language model has a sliding window."""
    config = tiny_model().config
    words = config.text_config.to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    names += ("num_attention_heads", "num_key_value_heads", "pad_token_id", "bos_token_id")
    text = MistralConfig(**{name: words[name] for name in names}, sliding_window=window, head_dim=8)
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=config.vision_config, text_config=text, image_token_index=IMAGE
    )
    model = LlavaForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=1.0 if "embed" in name else 0.3)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    return model


def test_windows_leave_their_first_columns_out():
    batch = doubled(tiny_batch())
    for more in ({}, {"cache_implementation": "static"}, {"num_beams": 2}):
        found = [model.generate(**batch, **GREEDY, **more) for model in both(mistral)]
        assert torch.equal(*found), more
    unlimited = both(lambda: mistral(None))[1].generate(**batch, **GREEDY, num_beams=2)
    assert not torch.equal(found[1], unlimited), "the window changes nothing"


class OwnLayer(DynamicLayer):
    """A cache layer of somebody else's, of which nothing is known."""


def chat(model, first, second, layer=None):
    """A turn of text, one with an image and one of text on the same cache; its logits."""
    cache = DynamicCache()
    if layer is not None:
        cache.layer_class_to_replicate = layer
    found, mask = [], torch.ones(1, 0, dtype=torch.long)
    for turn in (first, second, first):
        mask = torch.cat([mask, torch.ones_like(turn["input_ids"])], 1)
        more = {"attention_mask": mask, CACHE_NAME: cache, "use_cache": True}
        with torch.no_grad():
            found.append(model(**turn | more).logits[:, -1])
        held = int(cache.get_seq_length())
        mask = torch.ones(1, held, dtype=torch.long)
    return torch.stack(found)


def test_caches_that_hold_narrow_keys_are_told_at_the_call():
    words = {"input_ids": torch.tensor([[1, 5, 9, 7]])}
    image = doubled(tiny_batch(images=(1,), texts=(5,)))
    by_mask, by_channels = both()
    expected = chat(by_mask, words, image)
    close(chat(by_channels, words, image), expected)
    assert flash.widths[-1] == WIDE
    for order in ((words, image), (image, words)):
        expected = chat(by_mask, *order)
        close(chat(by_channels, *order, layer=OwnLayer), expected)
        close(chat(by_channels, *order), expected)


def test_gradients_are_those_of_the_mask():
    gradients = []
    for checkpointing in (False, True):
        for model in both():
            model.train()
            if checkpointing:
                model.gradient_checkpointing_enable()
            batch = doubled(tiny_batch(side="right"))
            labels = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, -100)
            labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
            model(**batch, labels=labels, use_cache=False).loss.backward()
            gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for found in gradients[1:]:
        assert found.keys() == gradients[0].keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, gradients[0][name], atol=1e-6, rtol=1e-5)


def test_packed_samples_do_not_see_each_other():
    one = [1, 7, 8, 9] + [IMAGE] * PATCHES + [5, 6]
    positions = torch.tensor([list(range(len(one))) * 2])
    pixels = torch.randn(2, 3, 96, 96).double()
    by_channels = both()[1]
    with torch.no_grad():
        packed = by_channels(
            input_ids=torch.tensor([one + one]), pixel_values=pixels, position_ids=positions
        ).logits
        # Given as above, because mean places are rounded otherwise where positions are counted.
        second = by_channels(
            input_ids=torch.tensor([one]),
            pixel_values=pixels[1:],
            position_ids=positions[:, : len(one)],
        ).logits
    close(packed[:, -second.shape[1] :], second)


def test_half_precision_answers_as_the_mask_does():
    found = []
    for name in ("sdpa", flash.NAME):
        model = flash.use(tiny_model().bfloat16(), name)
        pitome_vlm.wrap(model, keep=0.25)
        batch = tiny_batch()
        batch["pixel_values"] = batch["pixel_values"].bfloat16()
        with torch.no_grad():
            found.append(model(**batch).logits[:, -1].float())
    exact = both()[0](**doubled(tiny_batch())).logits[:, -1].float()
    errors = [(one - exact).abs().mean() for one in found]
    assert errors[1] <= 1.2 * errors[0]


def test_inputs_prepared_ahead_generate_the_same():
    by_mask, by_channels = both()
    batch = doubled(tiny_batch(images=(1, 1), texts=(4, 4)))
    expected = by_mask.generate(**batch, **GREEDY)[:, -6:]
    compact = pitome_vlm.compact_inputs(by_channels, **batch)
    assert torch.equal(by_channels.generate(**compact, **GREEDY), expected)


def test_unwrapping_and_copies():
    model, batch = flash.use(tiny_model()), tiny_batch()
    with torch.no_grad():
        stored = pickle.dumps(pitome_vlm.wrap(copy.deepcopy(model), keep=0.25))
        bare = model(**batch).logits
        merged = pitome_vlm.wrap(model, keep=0.25)(**batch).logits
        assert torch.equal(pickle.loads(stored)(**batch).logits, merged)
        assert torch.equal(copy.deepcopy(model)(**batch).logits, merged)
        pitome_vlm.unwrap(model)
        assert torch.equal(model(**batch).logits, bare)
    assert {type(m) for m in model.modules()} == {type(m) for m in tiny_model().modules()}


def test_what_carries_the_size_is_named():
    model = tiny_model()
    by_mask = pitome_vlm.describe(model)
    by_channels = pitome_vlm.describe(flash.use(model))
    assert "log-size bias (in channels of the keys), mean positions" in str(by_channels)
    assert by_channels.before.kv_bytes == by_mask.before.kv_bytes
    assert by_channels.after.kv_bytes * HEAD == by_mask.after.kv_bytes * WIDE


def test_a_kernel_chosen_after_wrapping_is_named():
    model = pitome_vlm.wrap(tiny_model(), keep=0.25)
    flash.use(model)
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=r"'flash_attention_3' since wrap\(\).*wrap.* again"):
            call(**tiny_batch())
    pitome_vlm.wrap(model, keep=0.25)
    model.generate(**tiny_batch(), **GREEDY)
    # The mask needs no preparation.
    flash.use(model, "sdpa").generate(**tiny_batch(), **GREEDY)


@torch.no_grad()
def test_a_cache_does_not_outlive_the_kernel_that_filled_it():
    image, more = doubled(tiny_batch(images=(1,), texts=(5,))), torch.tensor([[5]])
    for model in both():
        cache = DynamicCache()
        model(**image, **{CACHE_NAME: cache}, use_cache=True)
        named = model.model.language_model.config._attn_implementation
        other = "sdpa" if named == flash.NAME else flash.NAME
        flash.use(model, other)
        for wrap_again in (False, True):
            if wrap_again:
                pitome_vlm.wrap(model, keep=0.25)
            with pytest.raises(
                ValueError, match=f"was computed with log-size .*{other}.*new cache"
            ):
                model(input_ids=more, **{CACHE_NAME: cache})
        # Words alone go on as ever.
        model(input_ids=more, **{CACHE_NAME: DynamicCache()})


def capped(config):
    config.attn_logit_softcapping = 30.0


def wide(config):
    config.head_dim = 256


def own_kernel(config):
    config._attn_implementation_internal = "someone_elses"


@pytest.mark.parametrize(
    ("change", "obstacle"),
    [
        (capped, r"'flash_attention_3' .* would cap log\(size\) with the logits, at 30"),
        (wide, r"'flash_attention_3' .* up to 256 channels, which 256 of the model's fill"),
        (own_kernel, "'someone_elses' of the language model adds no float mask"),
    ],
)
def test_kernels_that_cannot_carry_it_are_named(change, obstacle, monkeypatch):
    model = flash.use(tiny_model())
    change(model.model.language_model.config)
    said = []
    monkeypatch.setattr("pitome_vlm.wrapping.positions.logger.warning_once", said.append)
    pitome_vlm.wrap(model, keep=0.25)
    assert "no size bias, compact positions" in str(pitome_vlm.describe(model))
    assert len(set(said)) == 1
    pitome_vlm.unwrap(model)
    if change is own_kernel:
        # Asked for by name, a kernel of which nothing is known is tried.
        monkeypatch.setitem(
            ALL_ATTENTION_FUNCTIONS, "someone_elses", ALL_ATTENTION_FUNCTIONS[flash.NAME]
        )
        pitome_vlm.wrap(model, keep=0.25, size_bias=True)
        model.model.language_model.config.is_causal = True
        assert "in channels" in str(pitome_vlm.describe(model))
        return
    with pytest.raises(ValueError, match=f"size_bias: .*{obstacle}"):
        pitome_vlm.wrap(model, keep=0.25, size_bias=True)
    assert not is_wrapped(model)


@pytest.mark.slow
def test_the_bundled_model_answers_as_with_the_mask_in_half_precision():
    samples = load_split("val", 200)
    answers = []
    for name in ("sdpa", flash.NAME):
        model, processor = pitome_vlm.load("demo")
        flash.use(model.bfloat16(), name)
        setting = Setting(name, MergeConfig(keep=0.25))
        with torch.no_grad():
            found = run(model, processor, [setting], samples, split="val", batch_size=40)
        answers.append(found[0].answers)
    assert answers[0] == answers[1]
    assert set(flash.widths) == {40}
