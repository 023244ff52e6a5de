"""Every algorithm's plan: against slow references, and the properties all of them share."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pitome_vlm import MergeConfig, algorithms
from pitome_vlm.algorithms.pitome import margin_at
from pitome_vlm.algorithms.pool import grid_cells
from pitome_vlm.merge import Algorithm, MergeContext, MergePlan, make_plan
from slow_reference import pitome_groups, tome_groups, weighted_mean

REDUCING = [name for name in algorithms.available() if name != "none"]
CONFIG = MergeConfig(keep=0.5)


def groups_of(plan: MergePlan, row: int = 0) -> set[frozenset[int]]:
    members: dict[int, list[int]] = {}
    for token, group in enumerate(plan.assign[row].tolist()):
        members.setdefault(group, []).append(token)
    return {frozenset(group) for group in members.values()}


def context(n: int, **options) -> MergeContext:
    options.setdefault("config", CONFIG)
    return MergeContext(grid=(1, n), **options)


@pytest.mark.parametrize("seed", range(200))
def test_pitome_is_algorithm_1_of_the_paper(seed):
    generator = torch.Generator().manual_seed(seed)
    n = int(torch.randint(4, 40, (1,), generator=generator))
    n_out = int(torch.randint((n + 1) // 2, n, (1,), generator=generator))
    leading, depth = seed % 2, (seed % 7) / 7
    keys = torch.randn(2, n + leading, 6, generator=generator, dtype=torch.float64)
    plan = make_plan(
        algorithms.get("pitome"), keys, n_out, ctx=context(n, depth=depth, n_leading=leading)
    )
    for row in range(2):
        body = keys[row, leading:].tolist()
        slow = pitome_groups(body, n_out, margin_at(depth))
        slow = {frozenset(i + leading for i in group) for group in slow}
        assert groups_of(plan, row) == slow | {frozenset([i]) for i in range(leading)}


@pytest.mark.parametrize("seed", range(200))
def test_tome_is_bipartite_soft_matching(seed):
    generator = torch.Generator().manual_seed(seed)
    n = int(torch.randint(4, 40, (1,), generator=generator))
    n_out = int(torch.randint((n + 1) // 2, n, (1,), generator=generator))
    leading = seed % 2
    keys = torch.randn(1, n + leading, 6, generator=generator, dtype=torch.float64)
    plan = make_plan(algorithms.get("tome"), keys, n_out, ctx=context(n, n_leading=leading))
    slow = tome_groups(keys[0, leading:].tolist(), n_out, class_token=bool(leading))
    slow = {frozenset(i + leading for i in group) for group in slow}
    assert groups_of(plan) == slow | {frozenset([i]) for i in range(leading)}


@pytest.mark.parametrize("weighted", [True, False])
def test_apply_is_the_weighted_mean_of_the_paper(weighted):
    torch.manual_seed(0)
    keys, values = torch.randn(3, 21, 5), torch.randn(3, 21, 7, dtype=torch.float64)
    sizes = torch.randint(1, 9, (3, 21)).float()
    plan = make_plan(algorithms.get("pitome"), keys, 13, ctx=context(21))
    merged, new_sizes = plan.apply(values, sizes, weighted=weighted)
    for row in range(3):
        weights = sizes[row].tolist() if weighted else [1.0] * 21
        for out in range(13):
            group = (plan.assign[row] == out).nonzero().flatten().tolist()
            expected = weighted_mean(values[row].tolist(), weights, group)
            torch.testing.assert_close(merged[row, out], torch.tensor(expected).double())
            assert new_sizes[row, out] == sum(sizes[row, i] for i in group)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(REDUCING),
    n=st.integers(1, 600),
    share=st.floats(0.01, 1),
    leading=st.integers(0, 1),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    content=st.sampled_from(["random", "zero", "constant", "two values"]),
    seed=st.integers(0, 1000),
)
def test_every_plan_is_an_exact_partition(name, n, share, leading, dtype, content, seed):
    torch.manual_seed(seed)
    keys = torch.randn(2, n + leading, 8)
    if content == "zero":
        keys = torch.zeros_like(keys)
    elif content != "random":
        keys = keys[:1, :1] * torch.where(torch.rand(2, n + leading, 1) < 0.5, 1.0, -1.0)
        keys = keys.abs() if content == "constant" else keys
    keys = keys.to(dtype)
    before, n_out = keys.clone(), max(1, round(share * n))
    plan = make_plan(algorithms.get(name), keys, n_out, ctx=context(n, n_leading=leading))
    total = n + leading
    assert torch.equal(keys, before)
    assert (plan.n_in, plan.n_out) == (total, n_out + leading)
    merged, sizes = plan.apply(keys)
    assert sizes.sum(1).tolist() == [total, total]
    assert merged.dtype == dtype
    assert bool(merged.isfinite().all())
    index = torch.arange(plan.n_out).expand(2, -1)
    assert torch.equal(plan.assign.gather(1, plan.kept), index)  # every group has its token
    assert bool((plan.assign >= 0).all())
    assert bool((plan.assign < plan.n_out).all())
    assert bool((plan.kept.diff(dim=1) > 0).all())  # raster order
    if leading:
        assert (plan.assign == 0).sum(1).tolist() == [1, 1]  # CLS is first and alone
        assert torch.equal(merged[:, 0], keys[:, 0])


@pytest.mark.parametrize("name", REDUCING)
def test_a_batch_is_its_images_one_by_one(name):
    torch.manual_seed(1)
    keys = torch.randn(4, 64, 8)
    ctx = MergeContext(CONFIG, grid=(8, 8))
    whole = make_plan(algorithms.get(name), keys, 20, ctx=ctx)
    order = [2, 0, 3, 1]
    shuffled = make_plan(algorithms.get(name), keys[order], 20, ctx=ctx)
    assert torch.equal(shuffled.assign, whole.assign[order])
    for row in range(4):
        alone = make_plan(algorithms.get(name), keys[row : row + 1], 20, ctx=ctx)
        assert torch.equal(alone.assign[0], whole.assign[row])


@pytest.mark.parametrize("name", ["pitome", "tome"])
def test_ties_go_to_the_earlier_token(name):
    keys = torch.eye(2).repeat_interleave(4, 0)[None].repeat(2, 1, 1)  # two clusters of four
    plans = [make_plan(algorithms.get(name), keys, 4, ctx=context(8)) for _ in range(2)]
    assert torch.equal(plans[0].assign, plans[1].assign)
    assert groups_of(plans[0], 0) == groups_of(plans[0], 1)
    assert all(max(group) < 4 or min(group) >= 4 for group in groups_of(plans[0]))


@pytest.mark.parametrize(
    "options",
    [
        {"energy": "elu"},
        {"energy": "gaussian"},
        {"split": "random"},
        {"split": "high_low"},
        {"protect": False},
        {"early_matching": 0.5},
        {"margin": 0.3},
    ],
    ids=str,
)
def test_variants_differ_from_the_paper_and_stay_exact(options):
    torch.manual_seed(0)
    clusters = torch.randn(6, 8)[torch.randint(0, 6, (48,))]
    keys = (clusters + 0.4 * torch.randn(48, 8))[None]
    paper = make_plan(algorithms.get("pitome"), keys, 30, ctx=context(48, depth=0.25))
    config = CONFIG.replace(**options)
    variant = make_plan(
        algorithms.get("pitome"), keys, 30, ctx=context(48, config=config, depth=0.25)
    )
    assert variant.n_out == 30
    assert groups_of(variant) != groups_of(paper)


def test_released_order_is_protected_tokens_then_receivers_by_energy():
    torch.manual_seed(0)
    keys = torch.randn(1, 20, 8)
    config = MergeConfig.preset("released", keep=0.5)
    plan = make_plan(algorithms.get("pitome"), keys, 14, ctx=context(20, config=config, depth=0.9))
    ordered = make_plan(
        algorithms.get("pitome"),
        keys,
        14,
        ctx=context(20, config=config.replace(restore_order=True), depth=0.9),
    )
    assert groups_of(plan) == groups_of(ordered)
    assert plan.kept.tolist() != ordered.kept.tolist()
    sizes = plan.apply(keys)[1][0]
    assert sizes[:8].tolist() == [1] * 8  # 20 - 2 * 6 protected tokens come first


def test_random_follows_its_seed_and_no_global_state():
    keys = torch.randn(2, 50, 4)

    def kept(seed, layer=0):
        ctx = context(50, config=CONFIG.replace(seed=seed), layer=layer)
        return make_plan(algorithms.get("random"), keys, 20, ctx=ctx).kept.tolist()

    state = torch.random.get_rng_state()
    assert kept(3) == kept(3)
    assert kept(3) != kept(4)
    assert kept(3) != kept(3, layer=1)
    assert torch.equal(state, torch.random.get_rng_state())


def test_random_drops_values_instead_of_averaging():
    keys = torch.randn(1, 50, 4)
    plan = make_plan(algorithms.get("random"), keys, 20, ctx=context(50))
    merged, sizes = plan.apply(keys)
    assert torch.equal(merged, keys[:, plan.kept[0]])
    assert sizes.sum() == 50


def test_pool_is_average_pooling_where_the_grid_divides():
    image = torch.randn(1, 3, 12, 12)
    tokens = image.flatten(2).transpose(1, 2)
    plan = make_plan(algorithms.get("pool"), tokens, 36, ctx=MergeContext(CONFIG, grid=(12, 12)))
    pooled = torch.nn.functional.avg_pool2d(image, 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(plan.apply(tokens)[0], pooled)


@settings(max_examples=80, deadline=None)
@given(rows=st.integers(1, 25), columns=st.integers(1, 25), share=st.floats(0, 1))
def test_pool_cuts_any_grid_into_exactly_n_rectangles(rows, columns, share):
    n_out = max(1, round(share * rows * columns))
    cells = grid_cells(rows, columns, n_out).view(rows, columns)
    assert cells.unique().tolist() == list(range(n_out))
    for cell in range(n_out):
        ys, xs = (cells == cell).nonzero(as_tuple=True)
        area = (ys.max() - ys.min() + 1) * (xs.max() - xs.min() + 1)
        assert area == len(ys)


def test_pool_refuses_tokens_that_are_no_grid():
    with pytest.raises(ValueError, match=r"whole patch grid.*stage=\"projector\""):
        make_plan(algorithms.get("pool"), torch.randn(1, 10, 4), 5, ctx=MergeContext(CONFIG))


@pytest.mark.parametrize("name", ["pitome", "tome"])
def test_one_step_merges_at_most_half_and_chains_go_on(name):
    keys = torch.randn(1, 20, 4)
    with pytest.raises(ValueError, match=r"n_out must be in 10\.\.20, got 9"):
        algorithms.get(name).plan(keys, 9, ctx=context(20))
    assert make_plan(algorithms.get(name), keys, 1, ctx=context(20)).n_out == 1


@pytest.mark.parametrize("n_out", [0, 21, -1])
def test_a_count_that_cannot_be_is_an_error(n_out):
    with pytest.raises(ValueError, match=rf"n_out must be in 1\.\.20.*got {n_out}"):
        make_plan(algorithms.get("pitome"), torch.randn(1, 20, 4), n_out, ctx=context(20))


def test_registry_suggests_and_protects_names():
    with pytest.raises(ValueError, match=r"unknown algorithm 'pitomee'.*mean 'pitome'.*tome"):
        algorithms.get("pitomee")
    with pytest.raises(ValueError, match="already registered"):
        algorithms.register(Algorithm("tome", algorithms.get("pitome").plan, "test"))
    assert algorithms.register(algorithms.get("tome")) is algorithms.get("tome")


def test_an_algorithm_that_miscounts_is_caught():
    def lazy(keys, n_out, *, ctx):
        return MergePlan.identity(keys)

    with pytest.raises(ValueError, match="'lazy' left 20 tokens, not 12"):
        make_plan(Algorithm("lazy", lazy, "test"), torch.randn(1, 20, 4), 12, ctx=context(20))


def test_unmerge_spreads_and_chained_plans_compose():
    torch.manual_seed(0)
    keys = torch.randn(2, 30, 4)
    first = make_plan(algorithms.get("pitome"), keys, 20, ctx=context(30))
    merged, sizes = first.apply(keys)
    second = make_plan(algorithms.get("pitome"), merged, 12, ctx=context(20))
    both = first.then(second)
    torch.testing.assert_close(both.apply(keys)[0], second.apply(merged, sizes)[0])
    assert torch.equal(both.apply(keys)[1], second.apply(merged, sizes)[1])
    spread = both.unmerge(both.apply(keys)[0])
    assert spread.shape == keys.shape
    for row, group in ((0, 3), (1, 7)):
        rows = spread[row][both.assign[row] == group]
        assert bool((rows == rows[0]).all())


def test_gradient_flows_through_the_mean_and_not_the_decision():
    values = torch.randn(1, 12, 3, requires_grad=True)
    keys = torch.randn(1, 12, 3, requires_grad=True)
    plan = make_plan(algorithms.get("pitome"), keys, 8, ctx=context(12))
    plan.apply(values)[0].sum().backward()
    group_sizes = plan.merge_sizes(None).gather(1, plan.assign)
    torch.testing.assert_close(values.grad, (1 / group_sizes)[..., None].expand_as(values))
    assert keys.grad is None
