"""compile=True: the same groups from compiled functions, each compiled once."""

from __future__ import annotations

import functools

import pytest
import torch
from graphs import Graphs, no_older_graphs  # noqa: F401
from tiny import tiny_batch, tiny_model

import pitome_vlm
from pitome_vlm.merge import algorithms
from pitome_vlm.merge.algorithm import MergeContext, make_plan
from pitome_vlm.merge.compiled import compiled_plan
from pitome_vlm.merge.config import MergeConfig


def logits(model, batch, **options):
    with pitome_vlm.wrapped(model, **options), torch.no_grad():
        return model(**batch).logits


@pytest.mark.slow
def test_ten_batches_take_one_graph_per_merging_layer(monkeypatch):
    graphs = Graphs()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=graphs))
    model = tiny_model(layers=4)
    for algorithm, keep in (("pitome_plus", 0.25), ("tome", 0.5)):
        options = {"algorithm": algorithm, "keep": keep, "layers": [0, 1]}
        before = graphs.count
        for seed in range(10):
            batch = tiny_batch(seed=seed)
            compiled = logits(model, batch, compile=True, **options)
            torch.testing.assert_close(compiled, logits(model, batch, **options), rtol=0, atol=0)
        assert graphs.count - before == 2


@pytest.mark.slow
def test_a_merge_compiled_for_this_machine_is_the_same():
    model, batch = tiny_model(layers=2), tiny_batch()
    options = {"keep": 0.5, "algorithm": "tome", "layers": [0]}
    torch.testing.assert_close(
        logits(model, batch, compile=True, **options), logits(model, batch, **options)
    )


@pytest.mark.slow
def test_half_precision_compiled_for_this_machine_makes_the_same_groups():
    # Two rounds: the second one compares means, which a fused loop would not round.
    ctx = MergeContext(MergeConfig(tokens=90), layer=1, depth=0.3, n_leading=1)
    for name, dtype in (
        ("pitome_plus", torch.bfloat16),
        ("pitome_plus", torch.float16),
        ("tome", torch.bfloat16),
        ("pitome", torch.bfloat16),
    ):
        algorithm = algorithms.get(name)
        for seed in range(3):
            keys = torch.randn(2, 200, 64, generator=torch.Generator().manual_seed(seed)).to(dtype)
            made = [make(algorithm, keys, 90, ctx=ctx) for make in (make_plan, compiled_plan)]
            assert torch.equal(*(one.assign for one in made)), (name, dtype, seed)


@pytest.mark.slow
def test_training_with_checkpointing_goes_through(monkeypatch):
    graphs, found = Graphs(), []
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=graphs))
    for compiles in (False, True):
        model = tiny_model(layers=3).train()
        model.gradient_checkpointing_enable()
        pitome_vlm.wrap(model, keep=0.5, algorithm="tome", layers=[0], seed=1, compile=compiles)
        model(**tiny_batch()).logits.float().square().mean().backward()
        found.append([one.grad for one in model.parameters() if one.grad is not None])
    assert graphs.count == 1
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_nothing_to_compile_is_refused():
    model = tiny_model()
    for options in ({"stage": "projector"}, {"algorithm": "divprune"}):
        with pytest.raises(ValueError, match="compile=True"):
            pitome_vlm.wrap(model, keep=0.5, compile=True, **options)
