"""The baselines' plans against slow references, and what is particular to each of them.

What all algorithms share is in test_algorithms.py.
"""

from __future__ import annotations

import pytest
import torch
from slow_reference import (
    dct_truncated,
    diffrate_groups,
    divprune_choice,
    energies,
    mlerp,
    tome_groups,
    visionzip_groups,
    weighted_mean,
    with_nearest,
)

from pitome_vlm import MergeConfig
from pitome_vlm.merge import algorithms
from pitome_vlm.merge.algorithm import MergeContext, PairLimits, make_plan
from pitome_vlm.merge.algorithms.visionzip import contextual_count
from pitome_vlm.merge.plan import MergePlan

CONFIG = MergeConfig(keep=0.5)
SEEDS = range(60)


def draw(seed: int, *, fewest: float = 0.0):
    """Float64 tokens [2, N, 6], attention [2, N] and a count to leave."""
    generator = torch.Generator().manual_seed(seed)
    n = int(torch.randint(4, 40, (1,), generator=generator))
    n_out = int(torch.randint(max(1, round(fewest * n + 0.25)), n, (1,), generator=generator))
    keys = torch.randn(2, n, 6, generator=generator, dtype=torch.float64)
    return keys, torch.rand(2, n, generator=generator), n_out


def planned(name: str, keys: torch.Tensor, n_out: int, **options) -> MergePlan:
    options.setdefault("config", CONFIG)
    return make_plan(algorithms.get(name), keys, n_out, ctx=MergeContext(**options))


def named_groups(plan: MergePlan, row: int) -> dict[int, list[int]]:
    """Members of every group, under the token it is named after."""
    names = plan.kept[row, plan.assign[row]].tolist()
    members: dict[int, list[int]] = {}
    for token, name in enumerate(names):
        members.setdefault(name, []).append(token)
    return members


def same(groups: dict[int, list[int]], slow: dict[int, list[int]]) -> bool:
    return groups == {name: sorted(members) for name, members in slow.items()}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("leading", [0, 1])
def test_tofu_prunes_early_and_keeps_norms_late(seed, leading):
    keys, _, n_out = draw(seed, fewest=0.5)
    n = keys.shape[1]
    front = torch.ones(2, leading, 6, dtype=torch.float64)
    values = torch.randn(2, n + leading, 5, generator=torch.Generator().manual_seed(seed)).double()
    for depth in (0.0, 0.5, 0.51, 1.0):
        plan = planned("tofu", torch.cat([front, keys], 1), n_out, n_leading=leading, depth=depth)
        merged, sizes = plan.apply(values)
        for row in range(2):
            slow = tome_groups(keys[row].tolist(), n_out, class_token=bool(leading))
            slow = {frozenset(i + leading for i in group) for group in slow}
            groups = named_groups(plan, row)
            alone = {frozenset([i]) for i in range(leading)}
            assert {frozenset(members) for members in groups.values()} == slow | alone
            for place, name in enumerate(plan.kept[row].tolist()):
                assert sizes[row, place] == len(groups[name])
                if depth <= 0.5 or len(groups[name]) == 1:
                    assert torch.equal(merged[row, place], values[row, name])
                else:
                    expected = torch.tensor(mlerp(values[row].tolist(), groups[name])).double()
                    torch.testing.assert_close(merged[row, place], expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_dct_keeps_the_low_frequencies(seed):
    keys, _, n_out = draw(seed)
    plan = planned("dct", keys, n_out)
    values = torch.randn(2, keys.shape[1], 3, generator=torch.Generator().manual_seed(seed))
    merged, _ = plan.apply(values)
    for row in range(2):
        for channel in range(3):
            slow = dct_truncated(values[row, :, channel].tolist(), n_out)
            torch.testing.assert_close(merged[row, :, channel], torch.tensor(slow))


@pytest.mark.parametrize(("n", "n_out"), [(576, 575), (576, 144), (729, 1), (5, 4), (2000, 1999)])
def test_dct_of_a_constant_is_the_constant(n, n_out):
    constant = torch.tensor([3.0, -1.0, 0.25]).expand(1, n, 3)
    plan = planned("dct", constant, n_out)
    expected = constant[:, :n_out]
    torch.testing.assert_close(plan.apply(constant)[0], expected, atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # no half precision in between
        torch.testing.assert_close(plan.apply(constant)[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("piece_bytes", [1, 32 * 50, 32 * 137])
def test_dct_in_pieces_is_the_same_resampling(piece_bytes):
    values = torch.randn(2, 50, 7, dtype=torch.float64, requires_grad=True)
    whole, _ = planned("dct", values, 23).apply(values)
    pieces = PairLimits(piece_bytes=piece_bytes)
    found, _ = planned("dct", values, 23, pairs=pieces).apply(values)
    torch.testing.assert_close(found, whole)
    wanted = torch.autograd.grad(whole.square().sum(), values)[0]
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), values)[0], wanted)


def test_dct_follows_a_slow_wave_and_leaves_the_class_token_alone():
    place = (torch.arange(200) + 0.5) / 200
    values = torch.cat([torch.tensor([7.0]), torch.cos(3 * torch.pi * place)])[None, :, None]
    plan = planned("dct", values, 50, n_leading=1)
    merged, sizes = plan.apply(values, torch.full((1, 201), 2.0))
    assert merged[0, 0, 0] == 7
    wave = torch.cos(3 * torch.pi * (torch.arange(50) + 0.5) / 50)
    torch.testing.assert_close(merged[0, 1:, 0], wave, atol=1e-5, rtol=1e-5)
    assert sizes[0].tolist() == [2.0] + [8.0] * 50


@pytest.mark.parametrize("seed", range(5))
def test_dct_books_patches_on_the_nearest_place(seed):
    keys, _, n_out = draw(seed)
    n = keys.shape[1]
    for token, group in enumerate(planned("dct", keys, n_out).assign[0].tolist()):
        gaps = [abs((token + 0.5) / n - (i + 0.5) / n_out) for i in range(n_out)]
        assert gaps[group] == pytest.approx(min(gaps))


@pytest.mark.parametrize("seed", SEEDS)
def test_diffrate_prunes_the_last_and_merges_the_next(seed):
    keys, attention, n_out = draw(seed)
    plan = planned("diffrate", keys, n_out, cls_attention=attention)
    sizes = torch.randint(1, 9, attention.shape).float()
    merged, new_sizes = plan.apply(keys, sizes)
    for row in range(2):
        groups, pruned = diffrate_groups(keys[row].tolist(), attention[row].tolist(), n_out)
        assert same(named_groups(plan, row), groups)
        assert plan.dropped is not None
        assert set(plan.dropped[row].nonzero().flatten().tolist()) == pruned
        for place, name in enumerate(plan.kept[row].tolist()):
            used = [i for i in groups[name] if i not in pruned]
            mean = weighted_mean(keys[row].tolist(), sizes[row].tolist(), used)
            torch.testing.assert_close(merged[row, place], torch.tensor(mean).double())
            assert new_sizes[row, place] == sum(sizes[row, i] for i in groups[name])


@pytest.mark.parametrize("seed", SEEDS)
def test_visionzip_keeps_dominant_tokens_and_merges_context(seed):
    keys, attention, n_out = draw(seed)
    plan = planned("visionzip", keys, max(2, n_out), cls_attention=attention)
    for row in range(2):
        slow = visionzip_groups(keys[row].tolist(), attention[row].tolist(), max(2, n_out))
        assert same(named_groups(plan, row), slow)
    assert not plan.prune
    assert plan.dropped is None


def test_visionzip_shares_are_those_of_the_paper():
    assert {n: contextual_count(n) for n in (64, 128, 192)} == {64: 10, 128: 20, 192: 30}
    assert [contextual_count(n) for n in (1, 2, 3, 9, 10)] == [0, 1, 1, 1, 2]


def test_visionzip_with_one_token_keeps_the_dominant_one():
    keys, attention, _ = draw(3)
    plan = planned("visionzip", keys, 1, cls_attention=attention)
    merged, sizes = plan.apply(keys)
    assert plan.kept.flatten().tolist() == attention.argmax(1).tolist()
    assert torch.equal(merged[:, 0], keys[[0, 1], attention.argmax(1)])
    assert sizes.tolist() == [[keys.shape[1]]] * 2


@pytest.mark.parametrize("seed", SEEDS)
def test_divprune_is_greedy_max_min_diversity(seed):
    keys, _, n_out = draw(seed)
    plan = planned("divprune", keys, n_out)
    for row in range(2):
        chosen = divprune_choice(keys[row].tolist(), n_out)
        others = [i for i in range(keys.shape[1]) if i not in chosen]
        assert same(named_groups(plan, row), with_nearest(keys[row].tolist(), chosen, others))
    assert torch.equal(plan.apply(keys)[0][0], keys[0, plan.kept[0]])


def test_divprune_takes_one_of_every_kind_before_a_second():
    kinds = torch.randn(9, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(9).repeat_interleave(7)
    plan = planned("divprune", kinds[labels][None], 9)
    assert labels[plan.kept[0]].tolist() == list(range(9))
    assert plan.merge_sizes(None).tolist() == [[7.0] * 9]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("options", [{}, {"margin": 0.2, "alpha": 0.5}], ids=str)
def test_energy_select_keeps_the_lowest_energies(seed, options):
    keys, _, n_out = draw(seed)
    depth = (seed % 5) / 5
    plan = planned("energy_select", keys, n_out, config=CONFIG.replace(**options), depth=depth)
    for row in range(2):
        energy = energies(
            keys[row].tolist(), options.get("margin", 0.9 - 0.9 * depth), options.get("alpha", 1.0)
        )
        order = sorted(range(len(energy)), key=lambda i: energy[i])
        slow = with_nearest(keys[row].tolist(), order[:n_out], order[n_out:])
        assert same(named_groups(plan, row), slow)
    assert torch.equal(plan.apply(keys)[0][0], keys[0, plan.kept[0]])


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        # Nobody is preferred, so the first ones stay; VisionZip's context starts behind them.
        ("diffrate", [0, 1, 2]),
        ("visionzip", [0, 1, 2]),
        ("divprune", [0, 1, 2]),
        ("energy_select", [0, 1, 2]),
    ],
)
def test_ties_go_to_the_earlier_token(name, kept):
    keys = torch.ones(2, 8, 4)
    plan = planned(name, keys, 3, cls_attention=torch.full((2, 8), 1 / 8))
    assert plan.kept.tolist() == [kept, kept]


@pytest.mark.parametrize("name", ["diffrate", "visionzip"])
def test_ranking_without_attention_is_refused(name):
    with pytest.raises(ValueError, match=r"attention.*stage=\"tower\""):
        planned(name, torch.randn(1, 10, 4), 5)


def test_calibration_is_off_only_where_it_was_measured_to_harm():
    off = [n for n in algorithms.available() if not algorithms.get(n).calibrated]
    assert off == ["energy_select"]
