"""Budgets become exact counts, known before anything runs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pitome_vlm.merge.schedule import TowerShape, build_schedule
from pitome_vlm.merge.steps import Budget, apply_ratio, geometric_counts, halving_steps, plan_counts

CLIP_L = TowerShape(
    n_tokens=576, n_leading=1, leading_kept=0, n_layers=24, used_layers=23, grid=(24, 24)
)


@pytest.mark.parametrize(
    ("ratio", "published"),
    [(0.8, 6), (0.85, 17), (0.875, 30), (0.9, 54), (0.925, 101), (0.95, 183), (0.975, 330)],
)
def test_ratio_matches_the_counts_of_the_paper_faithful_schedule(ratio, published):
    # reference/pitome-paper.md 3.1, CLIP-L/336, all 23 effective layers, CLS stripped, +-1
    counts = plan_counts(576, 23, Budget(ratio=ratio))
    assert abs(counts[-1] - published) <= 1


def test_ratio_uses_the_paper_s_floor_expression():
    assert apply_ratio(576, 0.9) == 576 - int(576 - 576 * 0.9)
    assert apply_ratio(1, 0.5) == 1


@given(n=st.integers(1, 5000), steps=st.integers(1, 40), share=st.floats(0.0001, 1))
def test_keep_and_tokens_are_hit_exactly(n, steps, share):
    target = max(1, round(share * n))
    counts = plan_counts(n, steps, Budget(tokens=target))
    assert counts[-1] == target
    assert len(counts) == steps
    assert all(a >= b for a, b in zip((n, *counts), counts, strict=False))
    kept = plan_counts(n, steps, Budget(keep=share))
    assert abs(kept[-1] - share * n) <= 0.5 or kept[-1] == 1


@given(n=st.integers(1, 3000), target=st.integers(1, 3000))
def test_halving_steps_is_the_fewest(n, target):
    steps, count = halving_steps(n, target), n
    for _ in range(steps):
        assert count > target
        count = (count + 1) // 2
    assert count <= target or steps == 0


def test_a_quarter_of_clip_l():
    schedule = build_schedule(CLIP_L, Budget(keep=0.25), stage="tower")
    assert (schedule.tokens_in, schedule.tokens_out) == (576, 144)
    assert schedule.layer_lengths()[-1] == 145
    assert len(schedule.tower) == 23
    assert not schedule.is_identity


@pytest.mark.parametrize("stage", ["tower", "projector", "both"])
@pytest.mark.parametrize("tokens", [1, 36, 144, 288, 575, 576])
def test_every_stage_reaches_the_same_count(stage, tokens):
    schedule = build_schedule(CLIP_L, Budget(tokens=tokens), stage=stage)
    assert schedule.tokens_out == tokens
    assert schedule.is_identity == (tokens == 576)
    assert bool(schedule.tower) == (stage != "projector" and tokens < 576)


def test_a_kept_class_token_counts():
    full = TowerShape(576, 1, 1, 24, 23, (24, 24))
    schedule = build_schedule(full, Budget(keep=0.25), stage="tower")
    assert (schedule.tokens_in, schedule.tokens_out) == (577, 144)
    assert schedule.tower[-1][1] == 143
    with pytest.raises(ValueError, match="smallest count for this model is 2"):
        build_schedule(full, Budget(tokens=1), stage="tower")


def test_chosen_layers_only():
    schedule = build_schedule(CLIP_L, Budget(tokens=100), stage="tower", layers=(4, 2, 11))
    assert [layer for layer, _ in schedule.tower] == [2, 4, 11]
    with pytest.raises(ValueError, match=r"layers must be in 0\.\.22.*got 23"):
        build_schedule(CLIP_L, Budget(tokens=100), stage="tower", layers=(23,))


def test_one_step_algorithms_use_the_last_layer():
    schedule = build_schedule(CLIP_L, Budget(tokens=100), stage="tower", one_step=True)
    assert schedule.tower == ((22, 100),)


def test_no_layer_before_the_features_is_said():
    shape = TowerShape(576, 1, 0, 24, 0)
    with pytest.raises(ValueError, match='stage="projector" instead'):
        build_schedule(shape, Budget(keep=0.5), stage="tower")
    assert build_schedule(shape, Budget(keep=0.5), stage="projector").tokens_out == 288


def test_more_projector_steps_on_request():
    schedule = build_schedule(CLIP_L, Budget(tokens=100), stage="projector", projector_steps=6)
    assert len(schedule.projector) == 6
    assert schedule.projector == geometric_counts(576, 6, 100)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({}, "exactly one of keep, tokens, ratio must be given, got none"),
        ({"keep": 0.5, "tokens": 3}, "got keep=0.5, tokens=3"),
        ({"keep": 0}, r"keep must be in \(0, 1\], got 0"),
        ({"keep": 1.5}, r"keep must be in \(0, 1\], got 1.5"),
        ({"keep": -1}, "got -1"),
        ({"keep": float("nan")}, "got nan"),
        ({"ratio": 0}, "ratio must be in"),
        ({"tokens": 0}, "tokens must be a whole number of at least 1, got 0"),
        ({"tokens": 2.5}, "whole number"),
        ({"tokens": float("inf")}, "whole number of at least 1, got inf"),
        ({"tokens": float("nan")}, "whole number of at least 1, got nan"),
    ],
)
def test_bad_budgets_name_field_value_and_range(words, message):
    with pytest.raises(ValueError, match=message):
        Budget(**words)


@pytest.mark.parametrize("value", ["0.5", True, [1]])
def test_budget_words_are_numbers(value):
    with pytest.raises(TypeError, match="keep must be a number"):
        Budget(keep=value)


def test_numbers_of_numpy_are_numbers():
    assert Budget(tokens=np.int64(64)).tokens == 64
    assert type(Budget(tokens=np.int64(64)).tokens) is int
    assert Budget(keep=np.float32(0.25)).keep == 0.25


def test_too_few_projector_steps_and_no_layers_are_said():
    with pytest.raises(ValueError, match="projector_steps must be at least 2 to get from 576"):
        build_schedule(CLIP_L, Budget(keep=0.25), stage="projector", projector_steps=1)
    with pytest.raises(ValueError, match="layers is empty"):
        build_schedule(CLIP_L, Budget(keep=0.25), stage="tower", layers=())


def test_more_tokens_than_there_are():
    with pytest.raises(ValueError, match=r"tokens must be in 1\.\.576.*got 577"):
        build_schedule(CLIP_L, Budget(tokens=577), stage="tower")
