"""pitome_plus: against plain loops, and what it was made for."""

from __future__ import annotations

import math

import torch
from tiny import tiny_model

import pitome_vlm
from pitome_vlm import MergeConfig
from pitome_vlm.merge import algorithms
from pitome_vlm.merge.algorithm import MergeContext, make_plan
from pitome_vlm.merge.algorithms.pitome import margin_at
from pitome_vlm.wrapping.wrap import schedule_of

PLUS = algorithms.get("pitome_plus")


def context(depth=0.0, **options):
    return MergeContext(config=MergeConfig(keep=0.5, **options), depth=depth)


def cosine(a, b):
    norm = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / norm


def slow_groups(keys, n_out, margin):
    """Energy-weighted matching by plain loops, a quarter of the tokens at most in a round."""
    members = [frozenset({i}) for i in range(len(keys))]
    while len(members) > n_out:
        left = max(n_out, len(members) - max(1, len(members) // 4))
        rows = [
            [sum(column) / len(m) for column in zip(*(keys[i] for i in m), strict=True)]
            for m in members
        ]
        members = [
            frozenset().union(*(members[i] for i in group))
            for group in sorted(slow_round(rows, left, margin), key=min)
        ]
    return set(members)


def slow_round(keys, n_out, margin):
    """The r best edges of two halves."""
    n = len(keys)
    similar = [[cosine(a, b) for b in keys] for a in keys]

    def value(x):
        return x if x >= margin else math.exp(x - margin) - 1

    energy = [sum(value(similar[i][j]) for j in range(n) if j != i) / n for i in range(n)]
    order = sorted(range(n), key=lambda i: -energy[i])
    side_a, side_b = order[::2], order[1::2]
    edges = []
    for place, a in enumerate(side_a):
        scores = [similar[a][b] + (energy[a] + energy[b]) / 2 for b in side_b]
        best = max(range(len(side_b)), key=lambda j: scores[j])
        edges.append((-scores[best], place, a, side_b[best]))
    groups = {i: {i} for i in range(n)}
    for _, _, source, destination in sorted(edges)[: n - n_out]:
        groups[destination].add(source)
        del groups[source]
    return {frozenset(group) for group in groups.values()}


def test_it_is_energy_weighted_matching():
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        n = int(torch.randint(4, 40, (1,), generator=generator))
        n_out = int(torch.randint(1, n, (1,), generator=generator))
        depth = (seed % 7) / 7
        keys = torch.randn(2, n, 6, generator=generator, dtype=torch.float64)
        plan = make_plan(PLUS, keys, n_out, ctx=context(depth))
        for row in range(2):
            found: dict[int, set[int]] = {}
            for token, group in enumerate(plan.assign[row].tolist()):
                found.setdefault(group, set()).add(token)
            fast = {frozenset(group) for group in found.values()}
            assert fast == slow_groups(keys[row].tolist(), n_out, margin_at(depth)), f"seed {seed}"


def scene(seed):
    """Twelve background patches, much alike, and two pairs of twin objects, each pair identical."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.eye(3, 8)
    tokens = [centres[0] + 0.05 * torch.randn(8, generator=generator) for _ in range(12)]
    tokens += [centres[1], centres[1], centres[2], centres[2]]
    order = torch.randperm(16, generator=generator)
    objects = {int((order == place).nonzero()) for place in range(12, 16)}
    return torch.stack(tokens)[order][None], objects


def test_twins_on_a_redundant_background_stay_apart():
    """ToMe merges the twins first, they are the most similar pairs; counting then fails."""
    for seed in range(20):
        keys, objects = scene(seed)
        plan = make_plan(PLUS, keys, 13, ctx=context())
        assert len({plan.assign[0, token].item() for token in objects}) == 4, f"seed {seed}"


def test_tome_does_merge_twins():
    lost = 0
    for seed in range(20):
        keys, objects = scene(seed)
        plan = make_plan(algorithms.get("tome"), keys, 13, ctx=context())
        lost += len({plan.assign[0, token].item() for token in objects}) < 4
    assert lost > 5


def test_different_tokens_are_not_merged_while_alike_ones_are_left():
    """PiToMe merges all of its 2k tokens pairwise; here an outlier keeps its place."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        alike = torch.ones(10, 8) + 0.05 * torch.randn(10, 8, generator=generator)
        different = torch.linalg.qr(torch.randn(8, 8, generator=generator))[0][:4]
        keys = torch.cat([alike, different])[torch.randperm(14, generator=generator)][None]
        plan = make_plan(PLUS, keys, 10, ctx=context())
        sizes = plan.apply(keys)[1][0]
        groups = [(plan.assign[0] == group).nonzero().flatten() for group in range(10)]
        for group in groups:
            if len(group) > 1:
                assert keys[0, group].std(0).max() < 0.2, f"seed {seed}"
        assert sizes.sum() == 14, f"seed {seed}"


def test_energy_order_is_an_option():
    keys = torch.randn(2, 12, 6)
    raster = make_plan(PLUS, keys, 8, ctx=context())
    scrambled = make_plan(PLUS, keys, 8, ctx=context(restore_order=False))
    assert (raster.kept.diff(dim=1) > 0).all()
    assert torch.equal(raster.kept, scrambled.kept.sort(dim=1).values)
    assert not torch.equal(raster.kept, scrambled.kept)
    values = torch.randn(2, 12, 5)
    order = scrambled.kept.argsort(dim=1)[..., None].expand(-1, -1, 5)
    torch.testing.assert_close(scrambled.apply(values)[0].gather(1, order), raster.apply(values)[0])


def slow_coverage(keys, n_out):
    """Greedy k-center by plain loops, then everyone to the nearest centre."""
    n = len(keys)
    far = [[1 - cosine(a, b) for b in keys] for a in keys]
    first = max(range(n), key=lambda i: min(far[i][j] for j in range(n) if j != i))
    centres = [first]
    while len(centres) < n_out:
        rest = [i for i in range(n) if i not in centres]
        centres.append(max(rest, key=lambda i: min(far[i][c] for c in centres)))
    groups = {c: {c} for c in centres}
    for i in range(n):
        if i not in groups:
            groups[min(centres, key=lambda c: far[i][c])].add(i)
    return {frozenset(group) for group in groups.values()}


def test_after_the_tower_it_covers():
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        n = int(torch.randint(3, 40, (1,), generator=generator))
        n_out = int(torch.randint(1, n, (1,), generator=generator))
        keys = torch.randn(2, n, 6, generator=generator, dtype=torch.float64)
        ctx = MergeContext(config=MergeConfig(keep=0.5), depth=1.0, at_projector=True)
        plan = make_plan(PLUS, keys, n_out, ctx=ctx)
        assert plan.n_out == n_out, f"seed {seed}"
        for row in range(2):
            found: dict[int, set[int]] = {}
            for token, group in enumerate(plan.assign[row].tolist()):
                found.setdefault(group, set()).add(token)
            fast = {frozenset(group) for group in found.values()}
            assert fast == slow_coverage(keys[row].tolist(), n_out), f"seed {seed}"


def test_half_of_the_tokens_at_once_keeps_pairs_apart_that_have_nothing_in_common():
    """In one round every token of one half would merge, with whatever is on the other side."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        background = torch.eye(9)[:1] + 0.02 * torch.randn(20, 9, generator=generator)
        keys = torch.cat([background, torch.eye(9)[1:]])
        keys = keys[torch.randperm(28, generator=generator)][None]
        plan = make_plan(PLUS, keys, 14, ctx=context())
        merged, sizes = plan.apply(keys)
        alone = merged[0][merged[0, :, 0] < 0.5]
        assert len(alone) == 8, f"seed {seed}"
        assert (sizes[0][merged[0, :, 0] < 0.5] == 1).all(), f"seed {seed}"


def test_two_thirds_of_the_reduction_happen_in_the_tower():
    schedule = schedule_of(pitome_vlm.wrap(tiny_model(), tokens=18))
    assert schedule.tower[-1][1] == round(144 * (18 / 144) ** (2 / 3))
    assert schedule.projector == (18,)
    by_ratio = schedule_of(pitome_vlm.wrap(tiny_model(), ratio=0.8))
    assert by_ratio.projector == ()  # the paper's r is about the layers of the tower
