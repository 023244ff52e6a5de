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
