"""The study of a real tower, on a tiny one: equal FLOPs, scores by hand, the page."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Dinov2Config, Dinov2Model

import pitome_vlm
from scripts.encoders import tower_report
from scripts.encoders.tower_cells import (
    DEFAULT,
    LEVELS,
    RECIPES,
    Inputs,
    Reader,
    Study,
    config_at,
    encode,
    measure,
    ranks,
)

IMAGES = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tower():
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=12, num_attention_heads=4, image_size=112, patch_size=14
    )
    # The counter knows no fused attention of CPUs.
    config._attn_implementation = "eager"
    return Dinov2Model(config).eval()


def counted(model) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(IMAGES[:1])
    return counter.get_total_flops()


@pytest.mark.slow
def test_recipes_of_a_level_cost_the_same(tower):
    whole = counted(tower)
    # The convolution of patches and the last norm are no layers.
    patches = 2 * 64 * 3 * 14**2 * 32
    for name in ("tome", DEFAULT, "pitome (paper)", "released code"):
        for level in LEVELS:
            config = config_at(tower, RECIPES[name], level, IMAGES)
            with pitome_vlm.wrapped(tower, config=config):
                share = (counted(tower) - patches) / (whole - patches)
            assert share == pytest.approx(level, abs=0.02), (name, level)


def test_a_cell_of_no_merging_is_the_tower_itself(tower):
    plain = encode(tower, IMAGES)
    reader = Reader(np.eye(2, 32), np.zeros(2), np.array([0, 1]))
    study = Study(Inputs(*[IMAGES] * 4), reader, reader, plain)
    cell = measure(tower, study, None, 1.0)
    assert cell["ranks"] == [[0, 0], [0, 0]]
    assert cell["photo_cls"] == cell["photo_patches"] == [1.0, 1.0]
    merged = measure(tower, study, RECIPES["tome"], 0.4)
    assert max(merged["photo_patches"]) < 1
    assert merged["tokens"]["google"] < 40
    results = {
        "cells": {"none": cell, "tome/0.4": merged, "random/0.4": merged},
        "sizes": {"emoji": 2, "digits": 2, "train": 4},
        "check": 1e-6,
        "provenance": {"cores": 2},
    }
    page = tower_report.report(results)
    assert f"{3 * len(RECIPES) - 2} of {3 * len(RECIPES)} cells are not measured yet" in page
    assert "## 40 % of the FLOPs" in page
    assert "| random | retrieval R@1, % |  |  | +0.0 (-" in page


def test_ranks_count_what_is_more_alike():
    gallery = torch.eye(3)
    queries = torch.tensor([[1.0, 0.2, 0.0], [0.9, 0.5, 0.1], [0.3, 0.2, 0.1]])
    assert ranks(queries, gallery) == [0, 1, 2]
