"""Proportional attention through kernels that take no mask, as flash kernels do.

These tests need no GPU. A stand-in is registered under a flash implementation's name; it
refuses what those kernels refuse (masks, unequal widths, widths that are no multiple of 8) and
computes plain attention otherwise, with logits and sums in at least float32 as they do.
"""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_batch, tiny_model
from transformers import CLIPVisionConfig, SiglipVisionConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import CLIPAttention
from transformers.models.siglip.modeling_siglip import SiglipAttention

import pitome_vlm
from pitome_vlm.adapters.tower import KERNELS
from pitome_vlm.merge.algorithm import log_size_bias
from pitome_vlm.merge.size_channels import with_size_channels
from scripts.speed.attention_ways import WAYS, by_channel, by_mask

FLASH = ["flash_attention_2", "flash_attention_3", "kernels-community/vllm-flash-attn3"]


def plain_attention(query, key, value, bias, scale):
    wide = torch.promote_types(query.dtype, torch.float32)
    logits = query.to(wide) @ key.to(wide).transpose(-1, -2) * scale
    logits = logits if bias is None else logits + bias
    return (logits.softmax(-1) @ value.to(wide)).to(query.dtype)


class FlashStandIn:
    """Called like transformers' flash functions."""

    def __init__(self):
        self.widths = []

    def __call__(
        self, module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs
    ):
        if attention_mask is not None:
            raise AssertionError("a flash kernel takes no additive mask")
        if not query.shape[-1] == key.shape[-1] == value.shape[-1]:
            raise AssertionError("a flash kernel wants queries, keys and values of one width")
        if query.shape[-1] % 8 or query.shape[-1] > 256:
            raise AssertionError("a flash kernel wants a width of 8, 16, .. 256")
        assert kwargs.get("is_causal", module.is_causal) is False
        assert dropout == 0.0
        self.widths.append(query.shape[-1])
        output = plain_attention(query, key, value, None, scaling)
        return output.transpose(1, 2).contiguous(), None


@pytest.fixture
def flash(request, monkeypatch):
    stand_in = FlashStandIn()
    stand_in.name = getattr(request, "param", FLASH[0])
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, stand_in.name, stand_in)
    return stand_in


def inputs(head_dim, dtype, *, n_tokens=60, heads=3, largest=576, seed=0):
    """Queries, keys, values as a half-precision model has them, and the exact bias."""
    generator = torch.Generator().manual_seed(seed)
    parts = [
        torch.randn(2, heads, n_tokens, head_dim, generator=generator).to(dtype) for _ in range(3)
    ]
    sizes = torch.randint(1, largest + 1, (2, n_tokens), generator=generator).float()
    sizes = torch.where(torch.rand(2, n_tokens, generator=generator) < 0.5, 1.0, sizes)
    return parts, log_size_bias(sizes, torch.promote_types(dtype, torch.float32))


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    head_dim=st.sampled_from([8, 61, 64, 72, 80, 88, 104, 128]),
    seed=st.integers(0, 10_000),
)
def test_the_channels_hold_log_size_as_exactly_as_float32(dtype, head_dim, seed):
    (query, key, value), bias = inputs(head_dim, dtype, n_tokens=9, seed=seed)
    scale = head_dim**-0.5
    before = [part.clone() for part in (query, key, value, bias)]
    wide = with_size_channels(query, key, value, bias, scale)
    assert len({part.shape for part in wide}) == 1
    assert wide[0].shape[-1] % 8 == 0
    assert [part.dtype for part in wide] == [dtype] * 3
    added = (wide[0][..., head_dim:].double() @ wide[1][..., head_dim:].double().mT) * scale
    exact = bias.double().expand_as(added)
    tolerance = {torch.float64: 1e-14, torch.float16: 1e-6}.get(dtype, 3e-7)
    torch.testing.assert_close(added, exact, atol=tolerance, rtol=tolerance)
    for part, own in zip((query, key, value), wide, strict=True):
        assert torch.equal(own[..., :head_dim], part)
    assert not wide[2][..., head_dim:].any()
    assert all(torch.equal(a, b) for a, b in zip(before, (query, key, value, bias), strict=True))


@pytest.mark.parametrize("way", ["mask", "channel", "flex"])
@pytest.mark.parametrize("head_dim", [64, 72])
def test_every_way_is_proportional_attention(way, head_dim):
    parts, bias = inputs(head_dim, torch.float64)
    found = WAYS[way](*parts, bias, head_dim**-0.5)
    expected = plain_attention(*parts, bias, head_dim**-0.5)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 72])
def test_half_precision_loses_no_more_by_channels_than_by_the_mask(dtype, head_dim):
    scale = head_dim**-0.5
    for seed in range(3):
        parts, bias = inputs(head_dim, dtype, n_tokens=300, seed=seed)
        exact = plain_attention(*(part.double() for part in parts), bias.double(), scale)
        wide = with_size_channels(*parts, bias, scale)
        mask, flash, channel = (
            (found.double() - exact).abs().mean()
            for found in (
                by_mask(*parts, bias, scale),
                plain_attention(*wide, None, scale)[..., :head_dim],
                by_channel(*parts, bias, scale),
            )
        )
        assert flash <= 1.5 * mask, seed
        assert channel <= 1.5 * mask, seed


def attention_layer(kind, heads=4, head_dim=64):
    torch.manual_seed(0)
    size = {"hidden_size": heads * head_dim, "num_attention_heads": heads}
    clip = kind == "clip"
    config = CLIPVisionConfig(**size) if clip else SiglipVisionConfig(**size)
    config._attn_implementation = "eager"
    layer = (CLIPAttention if clip else SiglipAttention)(config).eval()
    with torch.no_grad():
        for weight in layer.parameters():
            weight.mul_(4)
    return layer


def run(layer, x, bias, name):
    layer.config._attn_implementation_internal = name
    return KERNELS.attend(layer, KERNELS.project(layer, x), bias)


@pytest.mark.parametrize("flash", FLASH, indirect=True)
@pytest.mark.parametrize(("kind", "head_dim", "width"), [("clip", 64, 72), ("siglip", 72, 80)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_flash_layer_equals_the_eager_one(flash, kind, head_dim, width, dtype):
    layer = attention_layer(kind, head_dim=head_dim)
    x = torch.randn(2, 60, 4 * head_dim)
    _, bias = inputs(head_dim, torch.float64)
    # Not the eager function: its softmax is float32 whatever goes in.
    exact = run(copy.deepcopy(layer).double(), x.double(), bias, "sdpa")
    layer, own = layer.to(dtype), bias.to(torch.promote_types(dtype, torch.float32))
    found = run(layer, x.to(dtype), own, flash.name)
    assert flash.widths == [width]
    assert found.dtype == dtype
    if dtype == torch.float64:
        torch.testing.assert_close(found, exact, atol=1e-10, rtol=1e-10)
    for name in ("eager", "sdpa"):
        masked = run(layer, x.to(dtype), own, name)
        errors = [(one.double() - exact).abs().mean() for one in (found, masked)]
        assert errors[0] <= 1.5 * errors[1] + 1e-12
    # Before the first merge nothing is added, and heads keep their own width.
    run(layer, x.to(dtype), None, flash.name)
    assert flash.widths == [width, head_dim]


@pytest.mark.parametrize(("kind", "head_dim"), [("clip", 64), ("siglip", 72)])
def test_gradients_go_through_the_channels(flash, kind, head_dim):
    layer, (_, bias) = attention_layer(kind, head_dim=head_dim).double(), inputs(8, torch.float64)
    grads = []
    for name in ("sdpa", flash.name):
        x = torch.randn(2, 60, 4 * head_dim, generator=torch.Generator().manual_seed(1))
        x = x.double().requires_grad_()
        layer.zero_grad()
        run(layer, x, bias, name).square().sum().backward()
        grads.append([x.grad, *(weight.grad.clone() for weight in layer.parameters())])
    for ours, expected in zip(*reversed(grads), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(
    ("flash", "kind", "algorithm"),
    [
        *((FLASH[0], "clip", "pitome"), (FLASH[1], "siglip", "pitome_plus")),
        (FLASH[2], "clip", "pitome_plus"),
    ],
    indirect=["flash"],
)
def test_a_wrapped_tower_stays_on_flash(flash, kind, algorithm, caplog):
    features, losses = [], []
    for name in ("sdpa", flash.name):
        model = pitome_vlm.wrap(tiny_model(kind).double(), keep=0.25, algorithm=algorithm)
        model.model.vision_tower.config._attn_implementation_internal = name
        batch = tiny_batch()
        batch["pixel_values"] = batch["pixel_values"].double()
        with caplog.at_level(logging.WARNING):
            images = pitome_vlm.encode_images(model, batch["pixel_values"])
        features.append(torch.cat(list(images.features)))
        model(**batch, labels=batch["input_ids"]).loss.backward()
        losses.append([weight.grad for weight in model.model.vision_tower.parameters()])
    torch.testing.assert_close(*features, atol=1e-10, rtol=1e-10)
    assert set(flash.widths) == {8, 16}
    assert flash.widths.count(16) > flash.widths.count(8) > 0
    assert any(grad is not None and grad.any() for grad in losses[0])
    for ours, expected in zip(*reversed(losses), strict=True):
        assert (ours is None) == (expected is None)
        if ours is not None:
            torch.testing.assert_close(ours, expected, atol=1e-9, rtol=1e-7)
    assert "takes no additive mask" not in caplog.text


@pytest.mark.parametrize(
    ("name", "head_dim"),
    [("flex_attention", 64), ("someone_elses", 64), ("flash_attention_2", 256)],
)
def test_kernels_that_cannot_add_give_way_to_sdpa(name, head_dim, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError(f"{name} was called")

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, name, refuse)
    said = []
    monkeypatch.setattr("pitome_vlm.adapters.own_attention.logger.warning_once", said.append)
    layer, (_, bias) = attention_layer("clip", 2, head_dim), inputs(8, torch.float32)
    x = torch.randn(2, 60, 2 * head_dim)
    torch.testing.assert_close(run(layer, x, bias, name), run(layer, x, bias, "sdpa"))
    assert len(said) == 1
    assert f"attention implementation {name!r} takes no additive mask" in said[0]
    with pytest.raises(AssertionError, match="was called"):
        run(layer, x, None, name)


def test_the_tower_alone_can_be_given_another_implementation():
    model = pitome_vlm.wrap(tiny_model(), keep=0.25)
    model.set_attn_implementation({"vision_config": "eager", "text_config": "sdpa"})
    assert model.model.vision_tower.config._attn_implementation == "eager"
    assert model.model.language_model.config._attn_implementation == "sdpa"
    read = {m.config._attn_implementation for m in model.modules() if isinstance(m, CLIPAttention)}
    assert read == {"eager"}
