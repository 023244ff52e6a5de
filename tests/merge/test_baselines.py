"""The baselines' plans against slow references, and what is particular to each of them.

What all algorithms share is in test_algorithms.py.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from slow_reference import (
    diffrate_groups,
    divprune_choice,
    holov_choice,
    mlerp,
    scope_choice,
    tome_groups,
    visionzip_groups,
    vispruner_choice,
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


def test_tofu_prunes_early_and_keeps_norms_late():
    for seed, leading in product(SEEDS, [0, 1]):
        keys, _, n_out = draw(seed, fewest=0.5)
        n = keys.shape[1]
        front = torch.ones(2, leading, 6, dtype=torch.float64)
        values = torch.randn(
            2, n + leading, 5, generator=torch.Generator().manual_seed(seed)
        ).double()
        slow = [
            {
                frozenset(i + leading for i in group)
                for group in tome_groups(row, n_out, class_token=bool(leading))
            }
            for row in keys.tolist()
        ]
        alone = {frozenset([i]) for i in range(leading)}
        for depth in (0.0, 0.5, 0.51, 1.0):
            plan = planned(
                "tofu", torch.cat([front, keys], 1), n_out, n_leading=leading, depth=depth
            )
            merged, sizes = plan.apply(values)
            for row in range(2):
                groups = named_groups(plan, row)
                found = {frozenset(members) for members in groups.values()}
                assert found == slow[row] | alone, f"seed {seed}, depth {depth}"
                names = plan.kept[row].tolist()
                expected = values[row, plan.kept[row]].clone()
                for place, name in enumerate(names):
                    if depth > 0.5 and len(groups[name]) > 1:
                        expected[place] = torch.tensor(mlerp(values[row].tolist(), groups[name]))
                assert sizes[row].tolist() == [len(groups[name]) for name in names], f"seed {seed}"
                torch.testing.assert_close(merged[row], expected, msg=f"seed {seed}")
                alike = torch.tensor([depth <= 0.5 or len(groups[name]) == 1 for name in names])
                assert torch.equal(merged[row][alike], expected[alike]), f"seed {seed}"


def test_diffrate_prunes_the_last_and_merges_the_next():
    for seed in SEEDS:
        keys, attention, n_out = draw(seed)
        plan = planned("diffrate", keys, n_out, cls_attention=attention)
        sizes = torch.randint(1, 9, attention.shape).float()
        merged, new_sizes = plan.apply(keys, sizes)
        for row in range(2):
            groups, pruned = diffrate_groups(keys[row].tolist(), attention[row].tolist(), n_out)
            assert same(named_groups(plan, row), groups), f"seed {seed}"
            assert plan.dropped is not None, f"seed {seed}"
            assert set(plan.dropped[row].nonzero().flatten().tolist()) == pruned, f"seed {seed}"
            for place, name in enumerate(plan.kept[row].tolist()):
                used = [i for i in groups[name] if i not in pruned]
                mean = weighted_mean(keys[row].tolist(), sizes[row].tolist(), used)
                torch.testing.assert_close(
                    merged[row, place], torch.tensor(mean).double(), msg=f"seed {seed}"
                )
                assert new_sizes[row, place] == sum(sizes[row, i] for i in groups[name]), (
                    f"seed {seed}"
                )


def test_visionzip_keeps_dominant_tokens_and_merges_context():
    for seed in SEEDS:
        keys, attention, n_out = draw(seed)
        plan = planned("visionzip", keys, max(2, n_out), cls_attention=attention)
        for row in range(2):
            slow = visionzip_groups(keys[row].tolist(), attention[row].tolist(), max(2, n_out))
            assert same(named_groups(plan, row), slow), f"seed {seed}"
        assert not plan.prune, f"seed {seed}"
        assert plan.dropped is None, f"seed {seed}"


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


def test_divprune_is_greedy_max_min_diversity():
    for seed in SEEDS:
        keys, _, n_out = draw(seed)
        plan = planned("divprune", keys, n_out)
        for row in range(2):
            chosen = divprune_choice(keys[row].tolist(), n_out)
            others = [i for i in range(keys.shape[1]) if i not in chosen]
            assert same(
                named_groups(plan, row), with_nearest(keys[row].tolist(), chosen, others)
            ), f"seed {seed}"
        assert torch.equal(plan.apply(keys)[0][0], keys[0, plan.kept[0]]), f"seed {seed}"


def check_choice(plan, keys, attention, choice, seed, *options):
    """What a slow reference chooses stays, and everything else is with its nearest."""
    for row, (own, seen) in enumerate(zip(keys.tolist(), attention.tolist(), strict=True)):
        chosen = choice(own, seen, *options)
        others = [i for i in range(len(own)) if i not in chosen]
        assert same(named_groups(plan, row), with_nearest(own, chosen, others)), f"seed {seed}"


def test_scope_is_greedy_coverage_times_attention():
    for seed in range(24):
        keys, attention, n_out = draw(seed)
        power = (0.0, 1.0, 2.0)[seed % 3]
        config = MergeConfig(keep=0.5, algorithm="scope", saliency=power)
        plan = planned("scope", keys, n_out, cls_attention=attention, config=config)
        check_choice(plan, keys, attention, scope_choice, seed, n_out, power)


def test_scope_tells_tokens_of_little_attention_apart():
    """Most attention of a tower goes to few tokens; the others are no ties for that."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 200, 16, generator=generator, dtype=torch.float64)
    attention = (3 * torch.randn(1, 200, generator=generator, dtype=torch.float64)).softmax(-1)
    for power, limits in product((1.0, 4.0, 10.0), (None, PairLimits(8, 2**16))):
        config = MergeConfig(keep=0.5, algorithm="scope", saliency=power)
        exact, single = (
            planned("scope", one, 60, cls_attention=seen, config=config, pairs=limits).kept
            for one, seen in ((keys, attention), (keys.float(), attention.float()))
        )
        assert len(set(exact[0].tolist()) & set(single[0].tolist())) >= 58, (power, limits)


def test_scope_takes_distinct_tokens_where_nothing_is_left_to_cover():
    keys, attention = torch.ones(1, 12, 4), torch.rand(1, 12)
    plan = planned("scope", keys, 7, cls_attention=attention)
    assert len(set(plan.kept[0].tolist())) == 7
    assert int(attention.argmax()) in plan.kept[0].tolist()


def test_vispruner_keeps_important_and_diverse_tokens():
    for seed in SEEDS:
        keys, attention, n_out = draw(seed)
        share = (0.5, 0.0, 1.0, 0.7)[seed % 4]
        config = MergeConfig(keep=0.5, algorithm="vispruner", important=share)
        plan = planned("vispruner", keys, n_out, cls_attention=attention, config=config)
        check_choice(plan, keys, attention, vispruner_choice, seed, n_out, share)


def test_holov_keeps_the_most_attended_tokens_of_every_crop():
    for seed in SEEDS:
        keys, attention, n_out = draw(seed)
        n_crops = (16, 4, 1, 7)[seed % 4]
        # Crops of one token have no variance; all others scale it to their own mean attention.
        n_crops = min(n_crops, keys.shape[1] // 2)
        # A steep attention asks more of a crop than it has.
        attention = attention ** (1, 8)[seed % 2]
        config = MergeConfig(keep=0.5, algorithm="holov", crops=n_crops)
        plan = planned("holov", keys, n_out, cls_attention=attention, config=config)
        check_choice(plan, keys, attention, holov_choice, seed, n_out, n_crops)


def test_holov_spreads_equal_attention_over_the_image():
    keys = torch.randn(1, 48, 4, generator=torch.Generator().manual_seed(0))
    plan = planned("holov", keys, 16, cls_attention=torch.full((1, 48), 1 / 48))
    assert plan.kept.tolist() == [list(range(0, 48, 3))]


def test_divprune_takes_one_of_every_kind_before_a_second():
    kinds = torch.randn(9, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(9).repeat_interleave(7)
    plan = planned("divprune", kinds[labels][None], 9)
    assert labels[plan.kept[0]].tolist() == list(range(9))
    assert plan.apply(kinds[labels][None])[1].tolist() == [[7.0] * 9]


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        # Nobody is preferred, so the first ones stay; VisionZip's context starts after them.
        ("diffrate", [0, 1, 2]),
        ("visionzip", [0, 1, 2]),
        ("divprune", [0, 1, 2]),
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


def test_calibration_is_on_for_every_algorithm():
    assert all(algorithms.get(name).calibrated for name in algorithms.available())
