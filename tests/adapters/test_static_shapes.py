"""Nothing in a merge waits for the device or depends on data in its shape.

That is what compiling without graph breaks, and CUDA graphs, need. Checked without a GPU: tensors
that have shapes and no values (FakeTensorMode raises at `.item()`, `nonzero` and masks as indices),
and torch.compile with `fullgraph=True` and a backend that counts the graphs it is given.
"""

from __future__ import annotations

import pytest
import torch
from graphs import Graphs, no_older_graphs  # noqa: F401
from tiny import tiny_batch, tiny_model
from torch._subclasses.fake_tensor import FakeTensorMode

import pitome_vlm
from pitome_vlm.merge import algorithms
from pitome_vlm.merge.algorithm import MergeContext, PairLimits, make_plan
from pitome_vlm.merge.config import MergeConfig
from pitome_vlm.wrapping.wrap import schedule_of

OPTIONS = {
    **{name: {"algorithm": name} for name in algorithms.available() if name != "none"},
    "pitome, random split": {"algorithm": "pitome", "split": "random"},
    "pitome, high and low": {"algorithm": "pitome", "split": "high_low"},
    "pitome, nothing protected": {"algorithm": "pitome", "protect": False},
    "pitome, matching early": {"algorithm": "pitome", "early_matching": 0.5},
    "pitome, gaussian, energy order": {
        "algorithm": "pitome",
        "energy": "gaussian",
        "restore_order": False,
    },
    "pitome_plus, energy order": {"algorithm": "pitome_plus", "restore_order": False},
    "pitome_plus, elu, fixed margin": {"algorithm": "pitome_plus", "energy": "elu", "margin": 0.5},
    "tofu, merging only": {"algorithm": "tofu", "pruning_depth": 0.0},
    "tome, hidden states": {"algorithm": "tome", "metric": "hidden", "weighted": False},
}
LIMITS = {"whole": PairLimits(), "pieces": PairLimits(whole_up_to=10, piece_bytes=3000)}
N = 48
SLOW = [pytest.mark.slow]


def merge(keys, attention, sizes, config, algorithm, limits, at_projector):
    """One plan after one leading token, applied."""
    ctx = MergeContext(
        config,
        layer=2,
        depth=0.3,
        n_leading=1,
        grid=(6, 8),
        cls_attention=attention,
        pairs=limits,
        at_projector=at_projector,
    )
    plan = make_plan(algorithm, keys, config.tokens, ctx=ctx, sizes=sizes)
    merged, grown = plan.apply(keys, sizes)
    return merged, grown, plan.assign, plan.kept


def chosen(n_out, options):
    """Config and algorithm; a compiled model has found both before."""
    config = MergeConfig(tokens=n_out, **options)
    return config, algorithms.get(config.algorithm)


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(2, N + 1, 8, generator=generator)
    return keys, torch.rand(2, N, generator=generator), torch.ones(2, N + 1)


@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_plan_needs_no_values_for_its_shapes(options, limits):
    for n_out, at_projector in ((30, False), (12, False), (12, True)):
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(one) for one in tensors()]
            merged, sizes, assign, kept = merge(
                *fakes, *chosen(n_out, options), limits, at_projector
            )
        assert merged.shape == (2, n_out + 1, 8)
        assert sizes.shape == kept.shape == (2, n_out + 1)
        assert assign.shape == (2, N + 1)


def test_reading_a_value_would_be_noticed():
    with FakeTensorMode() as mode:
        keys = mode.from_tensor(tensors()[0])
        for read in (lambda: keys.sum().item(), lambda: keys[0, 0].nonzero()):
            with pytest.raises(RuntimeError):
                read()


FAST = {(name, "pieces") for name in OPTIONS if "," not in name and name != "pitome"}
FAST |= {("pitome_plus", "whole"), ("pitome", "whole")}
# Unrolled for every token that it takes, and for every round.
FAST -= {("scope", "pieces"), ("pitome_plus", "pieces")}


@pytest.mark.parametrize(
    ("options", "limits"),
    [
        pytest.param(options, kind, id=f"{name}-{kind}", marks=[] if (name, kind) in FAST else SLOW)
        for name, options in OPTIONS.items()
        for kind in LIMITS
        if kind == "whole" or "," not in name
    ],
)
def test_a_merge_is_one_graph_per_budget(options, limits):
    # Few pieces: Dynamo unrolls the loop over them.
    limits = PairLimits(whole_up_to=10, piece_bytes=10_000) if limits == "pieces" else PairLimits()
    graphs = Graphs()
    # Numbers stay numbers: as arguments they would become symbols at the second budget.
    compiled = torch.compile(merge, backend=graphs, fullgraph=True, dynamic=False)
    for n_out, at_projector, expected in ((12, False, 1), (6, True, 2)):
        for seed in (1, 2):
            arguments = (*tensors(seed), *chosen(n_out, options), limits, at_projector)
            for found, exact in zip(compiled(*arguments), merge(*arguments), strict=True):
                torch.testing.assert_close(found, exact)
        assert graphs.count == expected


@pytest.mark.parametrize(
    ("options", "dynamic"),
    [
        ({"algorithm": "pitome"}, None),
        # With numbers as symbols (PyTorch's default from the second budget on) Dynamo fails here.
        ({"algorithm": "pitome", "split": "random", "stage": "both"}, False),
        ({"algorithm": "pitome_plus", "stage": "tower"}, None),
        ({"algorithm": "random", "stage": "tower"}, False),
    ],
)
@pytest.mark.slow
def test_the_compiled_tower_is_one_graph_per_budget(options, dynamic):
    model, graphs, pixels = tiny_model(layers=4), Graphs(), tiny_batch()["pixel_values"]
    expected = {}
    for keep in (0.5, 0.25, 0.11):
        pitome_vlm.wrap(model, keep=keep, **options)
        expected[keep] = pitome_vlm.encode_images(model, pixels)
        assert schedule_of(model).tower
    model.model.vision_tower.compile(backend=graphs, fullgraph=True, dynamic=dynamic)
    for seen, keep in enumerate((0.5, 0.25, 0.11), 1):
        pitome_vlm.wrap(model, keep=keep, **options)
        for _ in range(3):
            found = pitome_vlm.encode_images(model, pixels)
            assert found.counts == expected[keep].counts
            assert all(map(torch.equal, found.source_maps, expected[keep].source_maps))
            for ours, exact in zip(found.features, expected[keep].features, strict=True):
                torch.testing.assert_close(ours, exact, atol=1e-4, rtol=1e-4)
        assert graphs.count == seen
