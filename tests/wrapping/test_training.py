"""Gradients with merging on: checkpointing, several passes before one backward, loss."""

from __future__ import annotations

import pytest
import torch
from tiny import IMAGE, tiny_batch, tiny_model

import pitome_vlm


def training_batch(kind, seed):
    batch = tiny_batch(kind, seed=seed)
    ids = batch["input_ids"]
    ignored = (ids == IMAGE) | (batch["attention_mask"] == 0)
    return batch | {"labels": ids.masked_fill(ignored, -100)}


def gradients(kind, stage, *, checkpointing, reentrant=False, batches=2):
    model = tiny_model(kind).train()
    if stage is not None:
        pitome_vlm.wrap(model, keep=0.25, stage=stage)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    # All forward passes come before the first backward pass.
    losses = [model(**training_batch(kind, seed)).loss for seed in range(batches)]
    sum(losses).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["clip", "siglip", "vipllava"])
@pytest.mark.parametrize("stage", ["tower", "both"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(kind, stage, reentrant):
    plain = gradients(kind, stage, checkpointing=False)
    saved = gradients(kind, stage, checkpointing=True, reentrant=reentrant)
    tower = [name for name in plain if "vision_tower" in name]
    assert any(plain[name].abs().max() > 0 for name in tower)
    if reentrant:
        # A reentrant checkpoint has no gradient for a region whose input needs none, so the
        # embeddings of the tower are the first to differ; everything it reports must be equal.
        plain = {name: plain[name] for name in saved}
        assert any("layers" in name and "vision_tower" in name for name in saved)
    assert plain.keys() == saved.keys()
    difference = max((plain[name] - saved[name]).abs().max() for name in plain)
    if kind == "vipllava" and reentrant:
        # Several features read one tower here, and a reentrant checkpoint makes autograd add
        # their gradients in another order: the unwrapped model differs by as much.
        bare = [gradients(kind, None, checkpointing=c, reentrant=c) for c in (False, True)]
        assert max((bare[0][name] - bare[1][name]).abs().max() for name in bare[1]) > 0
        scale = max(gradient.abs().max() for gradient in plain.values())
        assert difference < 1e-6 * scale
    else:
        assert difference == 0


def test_checkpointing_really_runs_layers_again():
    model = pitome_vlm.wrap(tiny_model(), keep=0.25).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    calls = []
    layer = model.model.vision_tower
    for name, module in layer.named_modules():
        if name.endswith("layers.2.layer_norm1"):
            module.register_forward_hook(lambda *_: calls.append(1))
    model(**training_batch("clip", 0)).loss.backward()
    assert len(calls) == 2


@pytest.mark.parametrize("stage", ["tower", "both"])
def test_gradient_equals_finite_differences(stage):
    # Up to the projector: the language model computes parts of itself in float32.
    model = pitome_vlm.wrap(tiny_model().double(), keep=0.25, stage=stage)
    pixels = tiny_batch(images=(1,), texts=(2,))["pixel_values"].double()
    torch.manual_seed(0)
    weights = torch.randn(36, 32, dtype=torch.float64)

    def loss():
        return (pitome_vlm.encode_images(model, pixels).features[0] * weights).sum()

    loss().backward()
    parameters = dict(model.named_parameters())
    names = [n for n in parameters if "projector.linear_1.weight" in n or "1.mlp.fc1.weight" in n]
    assert len(names) == 2
    for parameter in map(parameters.get, names):
        for index in ((0, 0), (7, 3), (20, 11)):
            numeric = 0.0
            for sign in (1, -1):
                with torch.no_grad():
                    parameter[index] += sign * 1e-6
                    numeric += sign * loss().item() / 2e-6
                    parameter[index] -= sign * 1e-6
            assert parameter.grad[index].item() == pytest.approx(numeric, rel=1e-4, abs=1e-6)


def test_a_training_step_lowers_the_loss_on_compact_inputs():
    model = pitome_vlm.wrap(tiny_model(), keep=0.25).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    batch, losses = training_batch("clip", 0), []
    for _ in range(4):
        compact = pitome_vlm.compact_inputs(model, **batch)
        out = model(**compact)
        assert out.logits.shape[:2] == compact["labels"].shape
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    assert losses[-1] < losses[0]
