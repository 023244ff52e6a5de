"""Every algorithm's plan: against slow references, and the properties all of them share."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_reference import pitome_groups, tome_groups, weighted_mean

from pitome_vlm import MergeConfig
from pitome_vlm.merge import algorithms
from pitome_vlm.merge.algorithm import Algorithm, MergeContext, cosine_similarity, make_plan
from pitome_vlm.merge.algorithms.pitome import energy_score, margin_at
from pitome_vlm.merge.algorithms.pool import grid_cells
from pitome_vlm.merge.plan import MergePlan

REDUCING = [name for name in algorithms.available() if name != "none"]
CONFIG = MergeConfig(keep=0.5)


def groups_of(plan: MergePlan, row: int = 0) -> set[frozenset[int]]:
    members: dict[int, list[int]] = {}
    for token, group in enumerate(plan.assign[row].tolist()):
        members.setdefault(group, []).append(token)
    return {frozenset(group) for group in members.values()}


def context(n: int, **options) -> MergeContext:
    options.setdefault("config", CONFIG)
    options.setdefault("grid", (1, n))
    return MergeContext(**options)


def attention_of(keys: torch.Tensor, leading: int = 0) -> torch.Tensor:
    """Something to rank tokens by that follows from each image alone."""
    return keys[:, leading:].float().sum(-1).softmax(-1)


def test_pitome_is_algorithm_1_of_the_paper():
    for seed in range(200):
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
            assert groups_of(plan, row) == slow | {frozenset([i]) for i in range(leading)}, (
                f"seed {seed}"
            )


def test_tome_is_bipartite_soft_matching():
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        n = int(torch.randint(4, 40, (1,), generator=generator))
        n_out = int(torch.randint((n + 1) // 2, n, (1,), generator=generator))
        leading = seed % 2
        keys = torch.randn(1, n + leading, 6, generator=generator, dtype=torch.float64)
        plan = make_plan(algorithms.get("tome"), keys, n_out, ctx=context(n, n_leading=leading))
        slow = tome_groups(keys[0, leading:].tolist(), n_out, class_token=bool(leading))
        slow = {frozenset(i + leading for i in group) for group in slow}
        assert groups_of(plan) == slow | {frozenset([i]) for i in range(leading)}, f"seed {seed}"


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


@settings(max_examples=120, deadline=None)
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
    ctx = context(n, n_leading=leading, cls_attention=attention_of(keys, leading))
    plan = make_plan(algorithms.get(name), keys, n_out, ctx=ctx)
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

    def planned(rows):
        ctx = context(64, grid=(8, 8), cls_attention=attention_of(keys[rows]))
        return make_plan(algorithms.get(name), keys[rows], 20, ctx=ctx)

    whole = planned(slice(None))
    order = [2, 0, 3, 1]
    assert torch.equal(planned(order).assign, whole.assign[order])
    for row in range(4):
        assert torch.equal(planned([row]).assign[0], whole.assign[row])


def test_ties_go_to_the_earlier_token():
    keys = torch.eye(2).repeat_interleave(4, 0)[None].repeat(2, 1, 1)  # 0-3 alike, 4-7 alike
    # ToMe, 0 2 4 6 against 1 3 5 7: the two best of four equal edges are those of 0 and 2, and
    # both go to the first of their equal partners.
    tome = make_plan(algorithms.get("tome"), keys, 6, ctx=context(8))
    expected = {frozenset({0, 1, 2}), *(frozenset({i}) for i in (3, 4, 5, 6, 7))}
    assert groups_of(tome, 0) == groups_of(tome, 1) == expected
    # PiToMe: equal energies, so the first four are mergeable, 0 2 into the first of 1 3.
    pitome = make_plan(algorithms.get("pitome"), keys, 6, ctx=context(8))
    assert groups_of(pitome, 0) == groups_of(pitome, 1) == expected


def test_energy_forms_by_hand():
    # Cosines of token 0 to 1, 2, 3: 0.8, 0, -0.6; margin 0.5; N = 4.
    keys = torch.tensor([[[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-0.6, 0.8]]], dtype=torch.float64)
    cosines = [0.8, 0.0, -0.6]
    by_hand = {
        "paper": 0.8 + (math.exp(-0.5) - 1) + (math.exp(-1.1) - 1),
        "elu": 0.3 + (math.exp(-0.5) - 1) + (math.exp(-1.1) - 1),
        "gaussian": sum(
            math.exp(-((1 - x) ** 2) / (2 * 0.5**2)) / (0.5 * math.sqrt(2 * math.pi))
            for x in cosines
        ),
    }
    for form, total in by_hand.items():
        energy = energy_score(cosine_similarity(keys), 0.5, form=form, alpha=1.0)
        assert energy[0, 0].item() == pytest.approx(total / 4)
    halved = energy_score(cosine_similarity(keys), 0.5, form="paper", alpha=0.5)
    assert halved[0, 0].item() == pytest.approx((0.8 + (by_hand["paper"] - 0.8) / 2) / 4)


def test_released_recipe_matches_bipartite_up_to_half_depth():
    # The authors' use_bsm = (idx <= 12) of 24 layers.
    torch.manual_seed(0)
    keys = torch.randn(1, 24, 8)
    config = MergeConfig.preset("released", keep=0.5)
    tome = make_plan(algorithms.get("tome"), keys, 16, ctx=context(24))
    for layer, bipartite in ((0, True), (12, True), (13, False), (22, False)):
        ctx = context(24, config=config, layer=layer, depth=layer / 24)
        plan = make_plan(algorithms.get("pitome"), keys, 16, ctx=ctx)
        assert (groups_of(plan) == groups_of(tome)) == bipartite


def test_chained_steps_compare_size_weighted_means():
    torch.manual_seed(0)
    keys, sizes = torch.randn(1, 24, 6), torch.randint(1, 30, (1, 24)).float()
    chained = make_plan(algorithms.get("tome"), keys, 7, ctx=context(24), sizes=sizes)
    first = make_plan(algorithms.get("tome"), keys, 12, ctx=context(24))
    means, _ = first.apply(keys, sizes)
    second = make_plan(algorithms.get("tome"), means, 7, ctx=context(12))
    assert torch.equal(chained.assign, first.then(second).assign)


def test_variants_differ_from_the_paper_and_stay_exact():
    torch.manual_seed(0)
    clusters = torch.randn(6, 8)[torch.randint(0, 6, (48,))]
    keys = (clusters + 0.4 * torch.randn(48, 8))[None]
    paper = make_plan(algorithms.get("pitome"), keys, 30, ctx=context(48, depth=0.25))
    variants: list[dict] = [{"energy": "elu"}, {"energy": "gaussian"}, {"margin": 0.3}]
    variants += [{"split": "random"}, {"split": "high_low"}, {"protect": False}]
    for options in [*variants, {"early_matching": 0.5}]:
        config = MergeConfig(keep=0.5, algorithm="pitome", **options)
        ctx = context(48, config=config, depth=0.25)
        variant = make_plan(algorithms.get("pitome"), keys, 30, ctx=ctx)
        assert variant.n_out == 30, options
        assert groups_of(variant) != groups_of(paper), options


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


def test_chained_plans_compose():
    torch.manual_seed(0)
    keys = torch.randn(2, 30, 4)
    first = make_plan(algorithms.get("pitome"), keys, 20, ctx=context(30))
    merged, sizes = first.apply(keys)
    second = make_plan(algorithms.get("pitome"), merged, 12, ctx=context(20))
    both = first.then(second)
    torch.testing.assert_close(both.apply(keys)[0], second.apply(merged, sizes)[0])
    assert torch.equal(both.apply(keys)[1], second.apply(merged, sizes)[1])


def test_gradient_flows_through_the_mean_and_not_the_decision():
    values = torch.randn(1, 12, 3, requires_grad=True)
    keys = torch.randn(1, 12, 3, requires_grad=True)
    plan = make_plan(algorithms.get("pitome"), keys, 8, ctx=context(12))
    plan.apply(values)[0].sum().backward()
    group_sizes = plan.apply(values)[1].gather(1, plan.assign)
    torch.testing.assert_close(values.grad, (1 / group_sizes)[..., None].expand_as(values))
    assert keys.grad is None
