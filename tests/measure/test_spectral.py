"""Spectral distance: what is proven about it, a slow reference, and what a tower merged."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from statistics import fmean

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model

from pitome_vlm import MergeConfig
from pitome_vlm.adapters.tower import find_encoder_layers
from pitome_vlm.demo import checkpoint_path, scene_image
from pitome_vlm.loading.models import load
from pitome_vlm.measure.spectral import (
    Clusters,
    can_merge,
    coarse_graph,
    composed_groups,
    kept_eigenspace,
    lemma1_error,
    lifted_graph,
    merge_changes,
    merge_clusters,
    mixed_groups,
    normalised_laplacian,
    recorded_merges,
    spectral_change,
    spectrum,
    token_graph,
)
from pitome_vlm.measure.spectral.report import check_lines
from pitome_vlm.measure.spectral.study import (
    FeatureRow,
    cases,
    check,
    synthetic_study,
    under_assumptions,
)
from pitome_vlm.wrapping.encode import encode_images
from pitome_vlm.wrapping.wrap import is_wrapped, wrapped

SEPARATED = (32, 16, 8, 5, 3)
CLOSE = (20, 16, 12, 9, 7)
DOMINANT = (50, 8, 4, 2)


def features(n: int, d: int, seed: int, batch: tuple[int, ...] = ()) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*batch, n, d, generator=generator, dtype=torch.float64)


def partition(n: int, groups: int, seed: int) -> torch.Tensor:
    """Every group taken, the rest anywhere."""
    rng = np.random.default_rng(seed)
    rest = rng.integers(0, groups, n - groups)
    return torch.from_numpy(rng.permutation(np.concatenate([np.arange(groups), rest])))


sized = st.tuples(st.integers(2, 24), st.integers(0, 10_000)).flatmap(
    lambda drawn: st.tuples(st.just(drawn[0]), st.integers(1, drawn[0]), st.just(drawn[1]))
)


# --- an independent reference: loops, and the eigenvalues of the non-symmetric D^-1 W


def slow_graph(x) -> np.ndarray:
    n = len(x)
    weights = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            if i != j:
                dot = sum(a * b for a, b in zip(x[i], x[j], strict=True))
                lengths = math.sqrt(sum(a * a for a in x[i])) * math.sqrt(sum(b * b for b in x[j]))
                weights[i, j] = 1 - dot / lengths
    return weights


def slow_lifted(weights: np.ndarray, assign) -> np.ndarray:
    n, lifted = len(weights), np.zeros_like(weights)
    for a in range(n):
        for b in range(n):
            block = [
                weights[i, j]
                for i in range(n)
                for j in range(n)
                if assign[i] == assign[a] and assign[j] == assign[b]
            ]
            lifted[a, b] = sum(block) / len(block)
    return lifted


def slow_spectrum(weights: np.ndarray) -> np.ndarray:
    """I - D^-1 W is similar to I - D^-1/2 W D^-1/2 and has its eigenvalues."""
    walk = np.array([row / sum(row) for row in weights])
    return np.sort(1 - np.linalg.eigvals(walk).real)


def test_everything_agrees_with_loops():
    for seed in range(20):
        try:
            _check_against_loops(seed)
        except AssertionError as error:
            error.add_note(f"seed {seed}")
            raise


def _check_against_loops(seed):
    n = 4 + seed % 9
    groups = 1 + seed % n
    x, assign = features(n, 5, seed), partition(n, groups, seed)
    weights = slow_graph(x.tolist())
    lifted = slow_lifted(weights, assign.tolist())
    graph = token_graph(x)
    np.testing.assert_allclose(graph, weights, atol=1e-12)
    np.testing.assert_allclose(lifted_graph(graph, assign, groups), lifted, atol=1e-12)
    np.testing.assert_allclose(spectrum(graph), slow_spectrum(weights), atol=1e-9)
    distance = sum(abs(slow_spectrum(weights) - slow_spectrum(lifted)))
    change = spectral_change(graph, assign, groups)
    assert change.distance.item() == pytest.approx(distance, abs=1e-8)
    laplacians = [normalised_laplacian(w).numpy() for w in (graph, torch.from_numpy(lifted))]
    norm = np.linalg.svd(laplacians[0] - laplacians[1], compute_uv=False)[0]
    assert change.bound.item() == pytest.approx(n * norm, abs=1e-9)


def test_coarse_weights_are_sums_and_averages_over_blocks():
    weights, assign = token_graph(features(7, 3, 0)), torch.tensor([0, 2, 1, 0, 0, 2, 1])
    members = [[0, 3, 4], [2, 6], [1, 5]]
    total, average = (coarse_graph(weights, assign, 3, how) for how in ("sum", "average"))
    for i, rows in enumerate(members):
        for j, columns in enumerate(members):
            block = [weights[a, b].item() for a in rows for b in columns]
            assert total[i, j].item() == pytest.approx(sum(block))
            assert average[i, j].item() == pytest.approx(sum(block) / len(block))


# --- what is proven


@settings(max_examples=150, deadline=None)
@given(sized)
def test_lemma_1_holds_with_sum_weights(drawn):
    n, groups, seed = drawn
    weights = token_graph(features(n, 4, seed))
    assert lemma1_error(weights, partition(n, groups, seed), groups, "sum").item() < 1e-9


def test_lemma_1_fails_with_the_papers_average_weights():
    """One pair merged among twelve tokens is enough."""
    weights = token_graph(features(12, 4, 0))
    assign = torch.tensor([0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
    assert lemma1_error(weights, assign, 11, "average").item() > 0.01
    assert lemma1_error(weights, assign, 11, "sum").item() < 1e-12


def test_average_weights_do_where_all_groups_are_of_one_size():
    weights, assign = token_graph(features(12, 4, 0)), torch.arange(12) % 4
    assert lemma1_error(weights, assign, 4, "average").item() < 1e-12


@settings(max_examples=150, deadline=None)
@given(sized)
def test_weyls_bound_holds_for_every_partition(drawn):
    n, groups, seed = drawn
    change = spectral_change(token_graph(features(n, 3, seed)), partition(n, groups, seed), groups)
    assert 0 <= change.distance.item() <= change.bound.item() + 1e-10


@settings(max_examples=60, deadline=None)
@given(sized, st.randoms(use_true_random=False))
def test_neither_the_order_of_tokens_nor_the_names_of_groups_matter(drawn, random):
    n, groups, seed = drawn
    x, assign = features(n, 4, seed), partition(n, groups, seed)
    order, names = list(range(n)), list(range(groups))
    random.shuffle(order)
    random.shuffle(names)
    renamed = torch.tensor(names)[assign][order]
    before, after = (
        spectral_change(token_graph(y), a, groups) for y, a in ((x, assign), (x[order], renamed))
    )
    assert after.distance.item() == pytest.approx(before.distance.item(), abs=1e-9)
    assert after.bound.item() == pytest.approx(before.bound.item(), abs=1e-9)


def test_merging_nothing_changes_nothing():
    weights = token_graph(features(30, 8, 3))
    change = spectral_change(weights, torch.arange(30), 30)
    assert change.distance.item() == 0
    assert change.bound.item() == 0


def test_a_batch_is_its_images_and_half_precision_is_measured_in_double():
    x = features(16, 8, 0, batch=(2, 3)).to(torch.bfloat16)
    assign = torch.stack([partition(16, 6, seed) for seed in range(6)]).view(2, 3, 16)
    change = spectral_change(token_graph(x), assign, 6)
    assert change.distance.shape == change.bound.shape == (2, 3)
    assert change.distance.dtype == torch.float64
    for i in range(2):
        for j in range(3):
            alone = spectral_change(token_graph(x[i, j].double()), assign[i, j], 6)
            assert change.distance[i, j].item() == pytest.approx(alone.distance.item(), abs=1e-12)
            assert change.bound[i, j].item() == pytest.approx(alone.bound.item(), abs=1e-12)


def test_identical_tokens_have_no_degree_and_cost_nothing():
    weights = token_graph(torch.ones(6, 4))
    assert spectrum(weights).tolist() == [1.0] * 6
    change = spectral_change(weights, torch.tensor([0, 0, 0, 1, 1, 1]), 2)
    assert change.distance.item() == change.bound.item() == 0
    # Merging exact duplicates next to another token changes nothing either.
    weights = token_graph(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    assert spectral_change(weights, torch.tensor([0, 0, 1]), 2).distance.item() < 1e-12


def test_graph_weights_are_distances():
    x = torch.tensor([[1.0, 0], [2, 0], [-3, 0], [0, 1], [0, 0]])
    weights = token_graph(x)
    assert torch.equal(weights, weights.T)
    assert weights.diagonal().tolist() == [0] * 5
    # A zero token has no direction: at distance one from all others.
    assert weights[0].tolist() == [0, 0, 2, 1, 1]
    assert weights.min() >= 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: token_graph(torch.ones(3)), "features must be [..., N, D]"),
        (lambda: token_graph(torch.ones(0, 3)), "features must be [..., N, D]"),
        (lambda: token_graph(torch.tensor([[1.0, math.nan]])), "features must be finite"),
        (lambda: change_of([0, 1, 3]), "groups 0..2, got 0..3"),
        (lambda: change_of([0, 1, -1]), "groups 0..2, got -1..1"),
        (lambda: change_of([0, 1, 1]), "one is empty"),
        (lambda: change_of([0, 1]), "assign must have shape (3,)"),
        (lambda: coarse_graph(torch.eye(2), torch.arange(2), 2, "mean"), "how must be one of"),
        (lambda: composed_groups([]), "plans is empty"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def change_of(assign):
    return spectral_change(token_graph(torch.eye(3)), torch.tensor(assign), 3)


def test_mixed_groups_counts_groups_with_several_labels():
    assign, labels = torch.tensor([0, 0, 1, 1, 2, 3]), torch.tensor([5, 5, 0, 2, 1, 1])
    assert mixed_groups(assign, labels, 4).item() == 0.25


# --- synthetic clusters


def test_layouts_hold_the_same_tokens_and_striped_aligns_parity():
    (mixed, shuffled), (striped, aligned) = (
        Clusters(SEPARATED, layout, 0.1).draw(3) for layout in ("random", "striped")
    )
    for labels in (shuffled, aligned):
        assert torch.bincount(labels).tolist() == list(SEPARATED)
    assert torch.equal(mixed.sort(dim=0).values, striped.sort(dim=0).values)
    assert set(aligned[::2].tolist()) == {0}
    assert 0 not in aligned[1::2].tolist()
    # Labels moved with their tokens: the largest coordinate is the cluster's own.
    assert torch.equal(striped[:, :5].argmax(-1), aligned)
    assert not torch.equal(Clusters(SEPARATED).draw(0)[1], Clusters(SEPARATED).draw(1)[1])


def test_noise_has_the_stated_length():
    tokens, labels = Clusters((400, 400), sigma=0.5, dim=128).draw(0)
    noise = tokens - torch.eye(2, 128, dtype=torch.float64)[labels]
    assert noise.square().sum(-1).mean().sqrt().item() == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sizes": (3,)}, "sizes must be at least two"),
        ({"sizes": (3, 0)}, "at least one token each"),
        ({"layout": "stripes"}, "layout must be one of random, striped"),
        ({"sigma": 0.0}, "sigma must be in (0, 10]"),
        ({"sigma": math.nan}, "sigma must be in (0, 10]"),
        ({"dim": 4}, "dim must be at least 5"),
    ],
)
def test_clusters_refuse_wrong_values(wrong, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Clusters(**{"sizes": SEPARATED, **wrong})


def refinement(labels: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Every true cluster in two halves, where it has two tokens."""
    n = len(labels)
    half = torch.tensor([int((labels[:i] == labels[i]).sum()) % 2 for i in range(n)])
    groups, assign = torch.unique(labels * 2 + half, return_inverse=True)
    return assign, len(groups)


@pytest.mark.parametrize("sizes", [SEPARATED, CLOSE, DOMINANT])
def test_a_refinement_of_the_true_partition_tends_to_no_distance(sizes):
    distances = []
    for sigma in (0.3, 0.1, 0.03, 0.01, 0.003):
        tokens, labels = Clusters(sizes, sigma=sigma).draw(0)
        assign, groups = refinement(labels)
        assert mixed_groups(assign, labels, groups).item() == 0
        distances.append(spectral_change(token_graph(tokens), assign, groups).distance.item())
    assert all(later < earlier / 3 for earlier, later in itertools.pairwise(distances))
    assert distances[-1] < 1e-4


def test_under_the_theorems_assumptions_pitome_is_far_closer_on_a_striped_layout():
    """A1-A3, one step: what Theorem 1 claims, and the only setting in which it shows."""
    clusters = Clusters(SEPARATED, "striped", 0.01)
    for seed in range(5):
        pitome, tome = (merge_clusters(clusters, name, seed=seed) for name in ("pitome", "tome"))
        for run in (pitome, tome):
            assert run.n_groups == 48, seed
            assert run.assumptions.hold, seed
            assert run.assumptions.own_margin_separates, seed
            assert run.assumptions.within > 0.999, seed
        assert pitome.mixed == 0, seed
        assert tome.mixed > 0.03, seed
        assert pitome.distance < tome.distance / 100, seed


def test_on_a_random_layout_tome_is_as_good():
    clusters = Clusters(SEPARATED, "random", 0.01)
    for name in ("pitome", "tome"):
        runs = [merge_clusters(clusters, name, seed=seed) for seed in range(5)]
        assert all(run.mixed == 0 and run.distance < 1e-3 for run in runs)


def test_pitome_is_not_always_closer():
    """Sizes that tie on the way (A3 fails): PiToMe mixes clusters and ToMe does not."""
    clusters = Clusters(CLOSE, "random", 0.01)
    pitome, tome = (
        [merge_clusters(clusters, name, steps=4, seed=seed) for seed in range(10)]
        for name in ("pitome", "tome")
    )
    assert not any(run.assumptions.strictly_ordered for run in pitome)
    assert fmean(run.mixed for run in pitome) > 0
    assert fmean(run.mixed for run in tome) == 0
    assert fmean(run.distance for run in pitome) > 10 * fmean(run.distance for run in tome)


def test_where_sizes_stay_ordered_four_steps_of_pitome_tend_to_no_distance():
    runs = [
        merge_clusters(Clusters(DOMINANT, "striped", sigma), "pitome", steps=4)
        for sigma in (0.1, 0.01, 0.001)
    ]
    assert all(run.assumptions.hold and run.mixed == 0 for run in runs)
    distances = [run.distance for run in runs]
    assert distances[2] < distances[1] / 30 < distances[0] / 900


def test_assumptions_are_measured_at_every_step():
    run = merge_clusters(Clusters(SEPARATED, "random", 0.01), "pitome", steps=4)
    steps = run.assumptions.step_sizes
    # 64 tokens, a quarter of them removed in every step, rounded down.
    assert [sum(sizes) for sizes in steps] == [64, 48, 36, 27]
    assert steps[0] == SEPARATED
    assert steps[1] == (16, 16, 8, 5, 3)
    assert run.n_groups == 21
    assert run.assumptions.largest_ratio == 1
    assert not run.assumptions.strictly_ordered
    assert run.assumptions.margins == pytest.approx((0.9, 0.675, 0.45, 0.225))
    loud = merge_clusters(Clusters((4, 3), sigma=5.0), "pitome").assumptions
    assert not loud.separated
    assert not loud.hold


def test_cosines_of_the_assumptions_are_those_of_the_tokens():
    clusters = Clusters((5, 3, 2), sigma=0.4)
    tokens, labels = clusters.draw(1)
    weights = slow_graph(tokens.tolist())
    within = [1 - weights[i, j] for i in range(10) for j in range(i) if labels[i] == labels[j]]
    across = [1 - weights[i, j] for i in range(10) for j in range(i) if labels[i] != labels[j]]
    facts = merge_clusters(clusters, "tome", seed=1).assumptions
    assert facts.within == pytest.approx(min(within))
    assert facts.across == pytest.approx(max(across))


def test_steps_are_checked_and_every_deciding_algorithm_can_be_asked():
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        merge_clusters(Clusters((4, 4)), "pitome", steps=0)
    with pytest.raises(ValueError, match="Did you mean 'tome'"):
        can_merge("toem")
    for name in ("pool", "random", "tome", "pitome"):
        run = merge_clusters(Clusters(SEPARATED), name, steps=2)
        assert run.n_groups == 36
        assert run.distance <= run.bound


# --- rows and checks


def test_a_study_sees_the_same_tokens_for_all_and_is_repeatable():
    chosen = cases([(8, 4, 2)], ((1, 0.75), (2, 0.5)))
    assert len(chosen) == 4
    ticks: list[None] = []
    words = (chosen, ["pitome", "tome"], [0.1, 0.01], 2)
    results = synthetic_study(*words, advance=lambda: ticks.append(None))
    assert len(ticks) == 2 * len(results) == 2 * 4 * 2 * 2
    assert results == synthetic_study(*words)
    for result in results:
        for seed, run in enumerate(result.runs):
            again = merge_clusters(
                Clusters((8, 4, 2), result.case.layout, result.sigma),
                result.algorithm,
                steps=result.case.steps,
                ratio=result.case.ratio,
                seed=seed,
            )
            assert run == again
    with pytest.raises(ValueError, match="seeds must be at least 1, got 0"):
        synthetic_study(chosen, ["pitome"], [0.1], 0)


def test_the_summary_counts_only_draws_with_the_assumptions():
    steps = ((1, 0.75), (4, 0.75))
    results = synthetic_study(cases([SEPARATED], steps), ["pitome", "tome"], [0.01], 3)
    pitome, tome, *totals = under_assumptions(results)
    assert totals == [dataclasses.replace(one, sigma=None) for one in (pitome, tome)]
    held = [
        run
        for result in results
        if result.algorithm == "pitome"
        for run in result.runs
        if run.assumptions.strictly_ordered
    ]
    assert (pitome.runs, pitome.draws, pitome.mixed) == (len(held), 12, 0)
    assert pitome.distance == max(run.distance for run in held)
    assert tome.mixed >= 3


def test_half_of_the_tokens_to_go_mixes_clusters_with_tome_only():
    """Proposition 2 of the paper: on random layouts, too."""
    clusters = Clusters(SEPARATED, "random", 0.01)
    mixed = {
        name: sum(merge_clusters(clusters, name, ratio=0.5, seed=s).mixed > 0 for s in range(20))
        for name in ("pitome", "tome")
    }
    assert mixed["pitome"] == 0
    assert mixed["tome"] >= 1


def test_the_leading_eigenspace_tells_true_groups_from_blind_ones():
    tokens, labels = Clusters((12, 8, 4), "random", 0.01).draw(0)
    # Three clusters: two directions apart from the mean.
    assert kept_eigenspace(tokens, labels, 3, leading=2).item() == pytest.approx(1, abs=1e-3)
    alone = torch.arange(24)
    assert kept_eigenspace(tokens, alone, 24).item() == pytest.approx(1)
    blind = labels[torch.randperm(24, generator=torch.Generator().manual_seed(0))]
    assert kept_eigenspace(tokens, blind, 3, leading=2).item() < 0.5
    # By hand: two opposite pairs, of which the groups join the wrong ones.
    line = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])
    assert kept_eigenspace(line, torch.tensor([0, 1, 0, 1]), 2, leading=1).item() < 1e-9
    half = kept_eigenspace(line, torch.tensor([0, 0, 0, 1]), 2, leading=1).item()
    assert half == pytest.approx(1 / 3)


def test_a_broken_bound_is_reported():
    good = FeatureRow("tome", 0, 4, 2, (0.1, 0.2), (0.1, 0.3))
    bad = FeatureRow("tome", 1, 2, 1, (0.1, 0.5), (0.2, 0.4))
    assert check([], [good]).passed
    checks = check([], [good, bad])
    assert (checks.partitions, checks.weyl_violations, checks.passed) == (4, 1, False)
    assert check_lines(checks) == ["Weyl bound: FAILED in 1 of 4 partitions"]


# --- the tower of a model


def pixels(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 96, 96, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def model():
    return tiny_model("clip")


@pytest.mark.parametrize("kind", ["clip", "clip_full", "siglip", "siglip_default"])
def test_recorded_merges_are_the_ones_the_model_makes(kind):
    model, images = tiny_model(kind), pixels(2)
    lead = int(kind == "clip_full")
    for name in ("pitome", "tome", "random"):
        config = MergeConfig(tokens=30, algorithm=name, stage="tower")
        merges = recorded_merges(model, images, config)
        assert not is_wrapped(model)
        with wrapped(model, config=config), torch.no_grad():
            visual = encode_images(model, images)
        whole = composed_groups(merge.plan for merge in merges)
        assert torch.equal(whole, torch.stack(visual.source_maps)[:, lead:] - lead), name
        for merge, later in itertools.pairwise(merges):
            assert merge.keys.shape[:2] == merge.plan.assign.shape, name
            assert merge.plan.n_out == later.keys.shape[1], name


def test_the_first_graph_is_that_of_the_layers_own_keys(model):
    images = pixels(2)
    seen = []
    attention = find_encoder_layers(model.model.vision_tower)[0][0].self_attn
    handle = attention.k_proj.register_forward_hook(lambda *call: seen.append(call[2]))
    with torch.no_grad():
        model.model.vision_tower(images)
    handle.remove()
    (projected,) = seen
    heads = projected.view(2, 145, 4, 8).mean(2)[:, 1:]
    for name in ("pitome", "random"):
        first = recorded_merges(model, images, MergeConfig(keep=0.25, algorithm=name))[0]
        torch.testing.assert_close(first.keys, heads)


def test_merge_changes_are_the_changes_of_the_recorded_merges(model):
    images = pixels(2)
    configs = {
        name: MergeConfig(keep=0.25, algorithm=name) for name in ("pitome", "tome", "random")
    }
    changes = merge_changes(model, images, configs)
    for name, config in configs.items():
        merges = recorded_merges(model, images, config)
        assert [layer.layer for layer in changes[name].layers] == [m.layer for m in merges]
        for layer, merge in zip(changes[name].layers, merges, strict=True):
            assert torch.equal(layer.change.distance, merge.change().distance)
            assert (layer.change.distance <= layer.change.bound).all()
        whole = composed_groups(merge.plan for merge in merges)
        graph = token_graph(merges[0].keys)
        torch.testing.assert_close(
            changes[name].composed.distance, spectral_change(graph, whole, 36).distance
        )
        assert changes[name].composed.n_tokens == 144
        assert changes[name].shuffled.n_groups == 36
    alone = merge_changes(model, images[1:], configs)
    for name in configs:
        torch.testing.assert_close(
            alone[name].composed.distance, changes[name].composed.distance[1:], rtol=1e-4, atol=0
        )


def test_a_large_reduction_in_one_layer_is_one_merge(model):
    images = pixels(1)
    config = MergeConfig(tokens=18, algorithm="tome", layers=(2,))
    (merge,) = recorded_merges(model, images, config)
    assert (merge.layer, merge.keys.shape[1], merge.plan.n_out) == (2, 144, 18)
    assert merge.change().distance.item() > 0


def test_blind_groups_are_worse_on_features_with_clusters():
    """The yardstick: groups of the same sizes, members drawn without looking."""
    model, processor = load(checkpoint_path(), dtype="float32")
    images = [scene_image(number, "val") for number in range(3)]
    batch = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    for change in merge_changes(
        model, batch, {n: MergeConfig(keep=0.25, algorithm=n) for n in ("pitome", "tome")}
    ).values():
        assert (change.composed.distance < change.shuffled.distance).all()
        # Blind groups keep n / N of the eigenspace.
        assert (change.kept_shuffled - 0.25).abs().max() < 0.05
        assert (change.kept > 0.4).all()
        assert (change.shuffled.distance <= change.shuffled.bound).all()


def test_nothing_to_merge_and_wrong_budgets_are_refused(model):
    images = pixels(1)
    with pytest.raises(ValueError, match="keeps all 144 visual tokens"):
        recorded_merges(model, images, MergeConfig(keep=1.0))
    with pytest.raises(ValueError, match=r"tokens must be in 1\.\.144"):
        recorded_merges(model, images, MergeConfig(tokens=500))
    with pytest.raises(ValueError, match="give a fixed budget"):
        recorded_merges(model, images, MergeConfig(keep="auto"))
    with pytest.raises(ValueError, match="configs is empty"):
        merge_changes(model, images, {})
    assert not is_wrapped(model)
