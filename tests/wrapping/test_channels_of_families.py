"""Families of the generic adapter under flash kernels: channels equal the mask."""

from __future__ import annotations

import flash
import pytest
import torch
from refused_family import SERVED, refused
from tiny_families import FAMILIES
from tiny_family import SPECIAL

import pitome_vlm
from pitome_vlm.adapters import find_adapter

# Their images see themselves in both directions, which transformers' code for flash kernels leaves
# out, wrapped or not. Gemma 4 is served by no adapter.
OTHER_MASKS = ("gemma3", "molmo2", "paligemma", "gemma4")
OWN = {name: family for name, family in FAMILIES.items() if name not in OTHER_MASKS}
PARTS = 10
GREEDY = {"max_new_tokens": 4, "do_sample": False}


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    flash.install(monkeypatch)


def wrapped(family, name):
    model = family.model()
    find_adapter(model).text_config(model)._attn_implementation_internal = name
    return pitome_vlm.wrap(model, keep=0.3)


def agree(family):
    batch = family.batch(side="right")
    by_mask, by_channels = (wrapped(family, name) for name in ("sdpa", flash.NAME))
    hidden = (batch["attention_mask"] == 0) | (batch["input_ids"] >= SPECIAL)
    labels = batch["input_ids"].masked_fill(hidden, -100)
    found = []
    for model in (by_mask, by_channels):
        flash.widths.clear()
        output = model(**batch | {"labels": labels})
        output.loss.backward()
        shown = pitome_vlm.compact_inputs(model, **batch)["attention_mask"] != 0
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append((output.loss, output.logits[shown], gradients))
    assert flash.widths
    (loss, logits, gradients), (own_loss, own_logits, own) = found
    torch.testing.assert_close(own_loss, loss, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(own_logits, logits, atol=1e-3 * float(logits.abs().max()), rtol=0)
    assert own.keys() == gradients.keys()
    for name, gradient in own.items():
        expected = gradients[name]
        error = (gradient - expected).abs().max()
        assert error <= 1e-3 * max(1e-2, float(expected.abs().max())), name
    left = family.batch()
    answer = by_mask.generate(**left, **GREEDY)
    for more in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(by_channels.generate(**left, **GREEDY, **more), answer), more


@pytest.mark.parametrize("part", range(PARTS))
def test_loss_gradients_and_answers(part):
    failed = {}
    for name in list(OWN)[part::PARTS]:
        try:
            (agree if SERVED else refused)(OWN[name])
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
    assert not failed, "\n".join(f"{name}: {why}" for name, why in failed.items())
