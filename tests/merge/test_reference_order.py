"""Merging through several layers, against slow versions of the published codes.

One layer alone hides the order of tokens: it decides who can be merged with whom in the next.
"""

from __future__ import annotations

import math

import pytest
import torch
from slow_reference import energy_step, matching_step, through_layers
from tiny import tiny_batch, tiny_model

import pitome_vlm
from pitome_vlm import MergeConfig
from pitome_vlm.merge.budget import new_pass, schedule_for
from pitome_vlm.merge.schedule import TowerShape
from pitome_vlm.wrapping.encode import encode_images

N, LAYERS = 90, 6


def merged(config: MergeConfig, values: torch.Tensor) -> list[list[list[int]]]:
    """Groups of first tokens after every layer of a tower that does nothing but merge."""
    shape = TowerShape(N, 1, 0, LAYERS, LAYERS)
    merge_pass = new_pass(config, schedule_for(config, shape), None)
    source, found = torch.arange(N + 1), []
    for layer in range(LAYERS):
        values = merge_pass.merge_in_layer(layer, values, values)
        source = merge_pass.plans[layer].assign[0, source]
        found.append([(source == i).nonzero().flatten().tolist() for i in range(values.shape[1])])
    return found


def tokens(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, N + 1, 6, generator=generator, dtype=torch.float64)


def share(n: int, ratio: float) -> int:
    """Tokens that go where a share stays, in the published code's words."""
    return math.floor(n - n * ratio)


@pytest.mark.parametrize("ratio", [0.9, 0.95])
def test_released_preset_is_the_published_code_in_every_layer(ratio):
    values, steps = tokens(round(100 * ratio)), []
    for layer in range(LAYERS):
        margin = 0.9 - 0.9 * layer / LAYERS
        # The published code's first 13 of 24 layers, in proportion; they count the class token.
        if layer <= LAYERS / 2:
            steps.append(lambda x: matching_step(x, share(len(x), ratio)))
        else:
            steps.append(lambda x, m=margin: energy_step(x, share(len(x) - 1, ratio), m))
    slow = through_layers(values[0].tolist(), steps, "plain")
    # The order is the same too: it is what the language model is given.
    assert merged(MergeConfig.preset("released", ratio=ratio), values) == slow
    ordered = merged(MergeConfig.preset("released", ratio=ratio, restore_order=True), values)
    assert [sorted(groups) for groups in ordered] == [sorted(groups) for groups in slow]


@pytest.mark.parametrize("ratio", [0.9, 0.95])
@pytest.mark.parametrize("how", ["weighted", "prune"])
def test_tome_and_tofu_are_the_published_code_in_every_layer(ratio, how):
    values = tokens(round(100 * ratio))
    # `ratio` is a share of the patches here: see `tome.py`.
    steps = [lambda x: matching_step(x, share(len(x) - 1, ratio))] * LAYERS
    slow = through_layers(values[0].tolist(), steps, how)
    config = MergeConfig(ratio=ratio, algorithm="tome")
    if how == "prune":
        config = MergeConfig(ratio=ratio, algorithm="tofu", pruning_depth=1.0)
    assert merged(config.replace(restore_order=False), values) == slow
    found = merged(config, values)
    assert [sorted(groups) for groups in found] == [sorted(groups) for groups in slow]
    raster = merged(config.replace(token_order="raster"), values)
    assert raster[0] == found[0]
    assert sorted(raster[-1]) != sorted(slow[-1])


def test_released_counts_are_those_of_the_published_run():
    # CLIP-L/336 at r = 0.9, class token included, as the authors' code leaves them after each
    # layer; its early layers count the class token.
    trace = [520, 468, 422, 380, 342, 308, 278, 251, 226, 204, 184, 166, 150]
    trace += [136, 123, 111, 100, 91, 82, 74, 67, 61, 55]
    shape = TowerShape(576, 1, 0, 24, 23)
    for ratio, left in {0.8: 5, 0.85: 17, 0.875: 30, 0.9: 54, 0.925: 101, 0.95: 183}.items():
        schedule = schedule_for(MergeConfig.preset("released", ratio=ratio), shape)
        assert schedule.tokens_out == left
        if ratio == 0.9:
            assert list(schedule.layer_lengths()) == trace
    paper = schedule_for(MergeConfig.preset("paper", ratio=0.9), shape)
    assert paper.layer_lengths()[:3] == (520, 469, 423)


def test_the_language_model_sees_raster_order_unless_told_otherwise():
    model, pixels = tiny_model(), tiny_batch()["pixel_values"]
    for algorithm in ("tome", "tofu"):
        kept = {}
        for restore in (True, False):
            options = {"algorithm": algorithm, "restore_order": restore}
            with pitome_vlm.wrapped(model, tokens=40, **options):
                kept[restore] = torch.stack(encode_images(model, pixels).anchors)
        assert bool((kept[True].diff(dim=1) > 0).all())
        assert not bool((kept[False].diff(dim=1) > 0).all())
        assert torch.equal(kept[False].sort(dim=1).values, kept[True])
