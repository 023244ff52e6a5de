"""What people pass by mistake leads to a line that says what to write instead."""

from __future__ import annotations

import contextlib

import pytest
import torch
from tiny import tiny_batch, tiny_model
from torch import nn
from transformers import Pipeline

import pitome_vlm
from pitome_vlm.wrapping.wrap import is_wrapped, observed


@pytest.fixture(scope="module")
def model():
    return tiny_model()


class FakePipeline(Pipeline):
    """A pipeline without a processor; only that it holds a model matters."""

    def __init__(self, model):
        self.model = model

    _sanitize_parameters = preprocess = _forward = postprocess = None


@pytest.mark.parametrize(
    ("around", "advice"),
    [
        (nn.DataParallel, r"wrap\(model.module"),
        (torch.compile, "wrap.. the model first"),
        (FakePipeline, r"wrap\(pipeline.model"),
    ],
)
def test_a_container_names_the_model_inside(model, around, advice):
    with pytest.raises(TypeError, match=advice):
        pitome_vlm.wrap(around(model), keep=0.5)
    assert not is_wrapped(model)


@pytest.mark.parametrize(("value", "word"), [(0.5, "keep=0.5"), (36, "tokens=36")])
def test_a_budget_needs_its_name(model, value, word):
    with pytest.raises(TypeError, match=word):
        pitome_vlm.wrap(model, value)
    with pytest.raises(TypeError, match=word), pitome_vlm.wrapped(model, value):
        pass
    assert not is_wrapped(model)


def test_a_mask_of_four_axes_needs_positions_on_a_cache_with_merged_images(model):
    """Sizes and positions of what is cached follow from a mask of one number per token."""
    batch = tiny_batch()
    with pitome_vlm.wrapped(model, keep=0.25), torch.no_grad():
        filled = model(**batch, use_cache=True)
        cache, shown = filled.past_key_values, filled.logits.shape[1]
        later = batch["input_ids"][:, -3:]
        mask = torch.ones(len(later), 1, 3, shown + 3, dtype=torch.bool).tril(shown)
        with pytest.raises(ValueError, match=r"must be \[batch, tokens\] where the cache"):
            model(input_ids=later, past_key_values=cache, attention_mask=mask)


def test_a_mask_of_one_row_holds_for_all(model):
    batch = tiny_batch()
    whole = batch | {"attention_mask": torch.ones_like(batch["input_ids"])}
    single = batch | {"attention_mask": whole["attention_mask"][:1]}
    assert len(batch["input_ids"]) > 1
    with pitome_vlm.wrapped(model, keep=0.25), torch.no_grad():
        assert torch.equal(model(**single).logits, model(**whole).logits)
        found = [
            model.generate(**one, max_new_tokens=3, do_sample=False) for one in (single, whole)
        ]
    assert torch.equal(*found)


def test_integer_pixels_are_refused_and_gradients_follow_the_caller(model):
    pixels = tiny_batch()["pixel_values"]
    with pitome_vlm.wrapped(model, keep=0.25):
        with pytest.raises(ValueError, match="floating point"):
            pitome_vlm.encode_images(model, (pixels * 100).to(torch.uint8))
        visual = pitome_vlm.encode_images(model, pixels)
        assert visual.features[0].requires_grad
        with torch.no_grad():
            assert not pitome_vlm.encode_images(model, pixels).features[0].requires_grad
    assert repr(visual) == (
        "VisualTokens(36 of 144, 36 of 144, 36 of 144 tokens, 32 channels, torch.float32)"
    )


def test_what_watches_an_encoding_is_gone_after_an_unwrap_inside(model):
    with observed(pitome_vlm.wrap(model, keep=0.5), contextlib.nullcontext):
        pitome_vlm.unwrap(model)
    assert not any(name.startswith("_pitome") for name in vars(model))
