"""Exact counts of packed images, and groups brought to them, as rules over all inputs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pitome_vlm import MergeConfig
from pitome_vlm.merge import algorithms
from pitome_vlm.merge.counts import Footprint, count_tokens, newline_share, scaled, shared_out
from pitome_vlm.merge.groups import divided, group_cells, merge_further, thinned
from pitome_vlm.merge.merge_pass import MergePass
from pitome_vlm.merge.schedule import TowerShape, build_schedule
from pitome_vlm.merge.steps import Budget

TILE = TowerShape(n_tokens=576, n_leading=1, leading_kept=0, n_layers=24, used_layers=23,
                  grid=(24, 24), packed=True)  # fmt: skip


def schedule_of(budget, stage="both"):
    return build_schedule(TILE, budget, stage=stage, tower_share=2 / 3)


footprints = st.builds(
    lambda patches, newlines, tiles: Footprint(patches + newlines, tiles, newlines),
    st.integers(1, 4000),
    st.integers(0, 200),
    st.integers(1, 12),
)


@given(footprints, st.floats(1e-6, 1.0))
def test_keep_is_the_fraction_of_the_images_own_count(footprint, keep):
    count = count_tokens(schedule_of(Budget(keep=max(keep, 0.01))), Budget(keep=keep), footprint)
    wanted = max(1, math.floor(keep * footprint.full + 0.5))
    assert count.full == footprint.full
    assert count.out == max(wanted, min(footprint.full, 1 + (footprint.newlines > 0)))


@given(footprints, st.integers(1, 576))
def test_tokens_are_per_tile(footprint, tokens):
    budget = Budget(tokens=tokens)
    count = count_tokens(schedule_of(budget), budget, footprint)
    exact = footprint.full * tokens / 576
    assert abs(count.out - exact) <= 0.5 or count.out == footprint.smallest()
    assert (count.out == footprint.full) >= (tokens == 576)


def test_ratio_leaves_the_fraction_that_the_tower_leaves():
    budget = Budget(ratio=0.95)
    schedule = schedule_of(budget, stage="tower")
    count = count_tokens(schedule, budget, Footprint(2928, 5, 48))
    assert count.out == scaled(2928, schedule.tokens_out, 576)


@given(footprints, st.data())
def test_newlines_get_their_share_and_patches_are_never_left_out(footprint, data):
    total = data.draw(st.integers(footprint.smallest(), footprint.full))
    lines = newline_share(footprint, total)
    patches = footprint.full - footprint.newlines
    assert (lines >= 1) == (footprint.newlines > 0)
    assert lines <= footprint.newlines
    assert 1 <= total - lines <= patches
    exact = total * footprint.newlines / footprint.full
    assert abs(lines - exact) <= 1 or lines == 1


labels = st.lists(st.integers(0, 30), min_size=1, max_size=80)


@given(labels, st.data())
def test_groups_are_divided_into_exactly_so_many(found, data):
    _, assign = torch.unique(torch.tensor(found), return_inverse=True)
    n = int(assign.max()) + 1
    wanted = data.draw(st.integers(n, len(found)))
    parts = divided(assign, wanted)
    assert sorted(set(parts.tolist())) == list(range(wanted))
    before = {}
    for old, new in zip(assign.tolist(), parts.tolist(), strict=True):
        # A part belongs to one group only: nothing is put together.
        assert before.setdefault(new, old) == old
    sizes = torch.bincount(parts)
    smallest_divided = [
        int(sizes[[new for new, old in before.items() if old == group]].min())
        for group in range(n)
        if sum(old == group for old in before.values()) > 1
    ]
    # The largest go first: nothing that is left is more than twice a part that was made.
    if smallest_divided:
        assert int(sizes.max()) <= 2 * min(smallest_divided) + 1


@given(labels, st.integers(1, 80), st.integers(0, 99))
def test_grouping_cells_reaches_the_count_from_below_and_keeps_values(found, wanted, seed):
    wanted = min(wanted, len(found))
    label = torch.tensor(found)
    table = torch.randn(31, 4, generator=torch.Generator().manual_seed(seed))
    anchors = torch.zeros(len(found), dtype=torch.bool)
    groups = group_cells(table[label], label, anchors, wanted)
    assert groups.n == max(wanted, len(set(found)))
    assert float(groups.sizes.sum()) == len(found)
    assert groups.kept.tolist() == sorted(groups.kept.tolist())
    assert torch.equal(groups.assign[groups.kept], torch.arange(groups.n))
    # Cells of a label are alike, so a part has the value of its group.
    torch.testing.assert_close(groups.features[groups.assign], table[label])


def test_attention_to_a_divided_token_is_what_it_was():
    """Parts that share a size weigh together what the group weighed, given log(size)."""
    torch.manual_seed(0)
    label = torch.tensor([0] * 6 + [1] * 3 + [2])
    values = torch.randn(3, 8)[label]
    none = torch.zeros(10, dtype=torch.bool)
    query = torch.randn(8)

    def attended(wanted):
        groups = group_cells(values, label, none, wanted)
        logits = groups.features @ query + groups.sizes.log()
        return logits.softmax(0) @ groups.features

    for wanted in (3, 5, 7, 10):
        torch.testing.assert_close(attended(wanted), attended(3), atol=1e-6, rtol=1e-5)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.data())
def test_shares_add_up(lengths, data):
    total = data.draw(st.integers(len(lengths), sum(lengths)))
    shares = shared_out(total, lengths)
    assert sum(shares) == total
    assert all(1 <= share <= length for share, length in zip(shares, lengths, strict=True))


def test_fewer_tokens_than_grids_are_refused():
    with pytest.raises(ValueError, match="1 tokens for 2 parts"):
        shared_out(1, [4, 5])


@given(st.integers(1, 60), st.data())
def test_separators_are_thinned_evenly(rows, data):
    wanted = data.draw(st.integers(1, rows))
    found = thinned(torch.zeros(rows, 2), wanted)
    assert found.n == wanted
    assert float(found.sizes.sum()) == rows
    assert float(found.sizes.max() - found.sizes.min()) <= 1
    assert found.assign.tolist() == sorted(found.assign.tolist())
    assert torch.equal(found.assign[found.kept], torch.arange(wanted))


@settings(max_examples=20)
@given(st.lists(st.integers(4, 40), min_size=1, max_size=4), st.integers(0, 99))
def test_images_merged_together_come_out_as_alone(lengths, seed):
    config = MergeConfig(keep=0.5, algorithm="tome")
    schedule = schedule_of(config.budget)
    merge_pass = MergePass(config, schedule, algorithms.get("tome"))
    generator = torch.Generator().manual_seed(seed)
    groups = []
    for length in [*lengths, lengths[0]]:
        values = torch.randn(length, 6, generator=generator)
        none = torch.zeros(length, dtype=torch.bool)
        groups.append(group_cells(values, torch.arange(length), none, length))
    wanted = [max(1, own.n // 3) for own in groups]
    together = merge_further(groups, wanted, merge_pass)
    for own, count, found in zip(groups, wanted, together, strict=True):
        (alone,) = merge_further([own], [count], merge_pass)
        assert found.n == count
        assert torch.equal(found.assign, alone.assign)
        torch.testing.assert_close(found.features, alone.features)
