"""Plans of very many tokens: made piece by piece, the same as from the whole matrix."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pitome_vlm.merge import algorithms, similarity
from pitome_vlm.merge.algorithm import MergeContext, PairLimits, make_plan
from pitome_vlm.merge.config import MergeConfig
from pitome_vlm.merge.similarity import Similarity

COMPARING = [name for name in algorithms.available() if algorithms.get(name).compares]
OPTIONS = {
    **{name: {"algorithm": name} for name in COMPARING if name != "none"},
    "pitome, nothing protected": {"algorithm": "pitome", "protect": False},
    "pitome, elu, energy order": {"algorithm": "pitome", "energy": "elu", "restore_order": False},
    "pitome, gaussian": {"algorithm": "pitome", "energy": "gaussian"},
    "pitome, matching early": {"algorithm": "pitome", "early_matching": 0.5},
    "pitome_plus, energy order": {"algorithm": "pitome_plus", "restore_order": False},
}
WHOLE = PairLimits(whole_up_to=10**6)
EPS = 1e-6


def plan_of(keys, n_out, options, limits, **context):
    config = MergeConfig(tokens=n_out, **options)
    leading = context.get("n_leading", 0)
    attention = keys[:, leading:].float().sum(-1).softmax(-1)
    ctx = MergeContext(config, layer=2, depth=0.3, pairs=limits, cls_attention=attention, **context)
    return make_plan(algorithms.get(config.algorithm), keys, n_out, ctx=ctx)


def assert_same(found, expected):
    assert torch.equal(found.assign, expected.assign)
    assert torch.equal(found.kept, expected.kept)
    assert found.prune == expected.prune
    assert (found.dropped is None) == (expected.dropped is None)
    assert found.dropped is None or torch.equal(found.dropped, expected.dropped)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    options=st.sampled_from(list(OPTIONS.values())),
    border=st.integers(4, 60),
    beyond=st.integers(-1, 40),
    share=st.floats(0.01, 1),
    rows=st.integers(1, 30),
    batch=st.integers(1, 3),
    leading=st.integers(0, 1),
    at_projector=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_pieces_make_the_plan_of_the_whole_matrix(
    options, border, beyond, share, rows, batch, leading, at_projector, seed
):
    # float64, where no two scores are apart by rounding alone.
    n_tokens = border + beyond
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(batch, n_tokens + leading, 16, generator=generator, dtype=torch.float64)
    n_out = max(1, round(share * n_tokens))
    where = {"n_leading": leading, "at_projector": at_projector}
    expected = plan_of(keys + 0.5, n_out, options, WHOLE, **where)
    limits = PairLimits(whole_up_to=border, piece_bytes=rows * n_tokens * 8)
    assert_same(plan_of(keys + 0.5, n_out, options, limits, **where), expected)


@settings(max_examples=150, deadline=None)
@given(
    options=st.sampled_from([one for one in OPTIONS.values() if one.get("energy") != "gaussian"]),
    n_tokens=st.integers(4, 70),
    share=st.floats(0.01, 1),
    rows=st.integers(1, 30),
    seed=st.integers(0, 1000),
)
def test_exact_ties_fall_the_same_way_in_float32(options, n_tokens, share, rows, seed):
    # Cosines are multiples of 1/4 without rounding, and none is below the margin: all scores are
    # exact, many are equal, and every tie has to go to the earlier token.
    generator = torch.Generator().manual_seed(seed)
    places = torch.rand(1, n_tokens, 8, generator=generator).argsort(-1)[..., :4]
    keys = torch.zeros(1, n_tokens, 8).scatter(-1, places, 0.5)
    keys = keys * torch.where(torch.rand(1, n_tokens, 1, generator=generator) < 0.3, -1.0, 1.0)
    n_out = max(1, round(share * n_tokens))
    if options["algorithm"] in ("pitome", "pitome_plus"):
        options = {**options, "margin": -1.0}
    if algorithms.get(options["algorithm"]).pairwise:
        # A second step would compare means, which are rounded.
        n_out = max(n_out, (n_tokens + 1) // 2)
    expected = plan_of(keys, n_out, options, WHOLE)
    limits = PairLimits(whole_up_to=3, piece_bytes=rows * n_tokens * 4)
    assert_same(plan_of(keys, n_out, options, limits), expected)


@settings(max_examples=60, deadline=None)
@given(
    n_tokens=st.integers(5, 90),
    rows=st.integers(1, 30),
    copies=st.booleans(),
    weighted=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_in_float32_only_ties_within_rounding_fall_otherwise(
    n_tokens, rows, copies, weighted, seed
):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(2, n_tokens, 12, generator=generator)
    keys = keys[:, torch.arange(n_tokens) % (n_tokens // 2)] if copies else keys
    similarity = Similarity(keys, PairLimits(whole_up_to=4, piece_bytes=rows * n_tokens * 4))
    exact = torch.nn.functional.normalize(keys.double(), dim=-1)
    cosines = exact @ exact.transpose(1, 2)
    sums = similarity.by_row(lambda piece, first: piece.sum(-1))
    torch.testing.assert_close(sums.double(), cosines.sum(-1), atol=n_tokens * EPS, rtol=0)

    order = torch.randperm(n_tokens, generator=generator).expand(2, -1)
    side_a, side_b = order[:, ::2], order[:, 1::2]
    worth = torch.rand(2, n_tokens, generator=generator) if weighted else None
    edges = cosines.gather(1, side_a[..., None].expand(-1, -1, n_tokens))
    edges = edges.gather(2, side_b[:, None].expand(-1, side_a.shape[1], -1))
    if worth is not None:
        both = worth.gather(1, side_a)[..., None] + worth.gather(1, side_b)[:, None]
        edges = edges + both.double() / 2
    pair = worth if worth is None else (worth.gather(1, side_a), worth.gather(1, side_b))
    scores, places = similarity.best(side_a, side_b, pair)
    best = edges.amax(-1)
    torch.testing.assert_close(scores.double(), best, atol=EPS, rtol=0)
    assert bool((edges.gather(2, places[..., None])[..., 0] >= best - 2 * EPS).all())

    chosen = similarity.farthest_first(n_tokens)
    for row in range(2):
        distance = 1 - cosines[row]
        assert sorted(chosen[row].tolist()) == list(range(n_tokens))
        isolation = distance.masked_fill(torch.eye(n_tokens).bool(), 9.0).amin(-1)
        assert isolation[chosen[row, 0]] >= isolation.max() - 2 * EPS
        for step in range(1, n_tokens):
            nearest = distance[:, chosen[row, :step]].amin(-1)
            left = nearest.index_fill(0, chosen[row, :step], -9.0)
            assert left[chosen[row, step]] >= left.max() - 2 * EPS


def test_greedy_selection_is_the_same_in_numpy_and_in_pytorch(monkeypatch):
    """On a CPU it runs in NumPy, on other devices in PyTorch; copies make ties."""
    for batch, n_tokens, seed in ((1, 30, 0), (3, 41, 1), (8, 144, 2)):
        keys = torch.randn(batch, n_tokens, 6, generator=torch.Generator().manual_seed(seed))
        keys = keys[:, torch.arange(n_tokens) % (n_tokens // 2)]
        found = Similarity(keys).farthest_first(n_tokens - 3)
        with monkeypatch.context() as patch:
            patch.setattr(similarity, "_has_numbers_on_cpu", lambda distance: False)
            assert torch.equal(Similarity(keys).farthest_first(n_tokens - 3), found)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_batching_changes_no_plan_in_pieces(options):
    torch.manual_seed(0)
    keys, limits = torch.randn(3, 90, 24), PairLimits(whole_up_to=50, piece_bytes=7 * 90 * 4)
    together = plan_of(keys, 45, options, limits)
    for row in range(3):
        alone = plan_of(keys[row : row + 1], 45, options, limits)
        assert torch.equal(alone.assign[0], together.assign[row])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("limits", [WHOLE, PairLimits(whole_up_to=4, piece_bytes=100)])
def test_an_algorithm_asked_to_keep_all_tokens_keeps_them(options, limits):
    keys = torch.randn(2, 9, 4)
    config = MergeConfig(tokens=9, **options)
    ctx = MergeContext(config, depth=0.3, pairs=limits, cls_attention=keys.sum(-1).softmax(-1))
    plan = algorithms.get(config.algorithm).plan(keys, 9, ctx=ctx)
    assert sorted(plan.assign[0].tolist()) == list(range(9))
    assert torch.equal(plan.kept.gather(1, plan.assign), torch.arange(9).expand(2, -1))


def test_coverage_in_pieces_keeps_duplicates_apart_last():
    keys = torch.randn(1, 12, 8, dtype=torch.float64).repeat(1, 3, 1)
    for limits in (WHOLE, PairLimits(whole_up_to=10, piece_bytes=500)):
        plan = plan_of(keys, 12, {"algorithm": "pitome_plus"}, limits, at_projector=True)
        # One of every triple stays, whichever way the distances were made.
        assert sorted(plan.kept[0].remainder(12).tolist()) == list(range(12))


def test_a_caller_with_gradients_gets_a_plan_in_pieces():
    keys = torch.randn(1, 40, 8, requires_grad=True)
    ctx = MergeContext(MergeConfig(keep=0.5), pairs=PairLimits(whole_up_to=10))
    assert algorithms.get("pitome").plan(keys, 20, ctx=ctx).n_out == 20


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(one, torch.Tensor) and not func.is_view:
                self.largest = max(self.largest, one.numel() * one.element_size())
        return out


@pytest.mark.parametrize("at_projector", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_no_tensor_of_a_large_plan_is_near_the_whole_matrix(options, at_projector):
    limits = PairLimits(whole_up_to=512, piece_bytes=2**17)
    keys = torch.randn(1, 1500, 8)
    # Scope goes over all pairs for every token that it takes, in the same memory each time.
    for n_out in (40,) if options["algorithm"] == "scope" else (1400, 600):
        with Largest() as seen:
            plan = plan_of(keys, n_out, options, limits, at_projector=at_projector)
        assert plan.n_out == n_out
        assert seen.largest <= 1.1 * limits.piece_bytes < 1500**2 * 4 / 60


PEAK = """
import sys, torch
from pathlib import Path
from pitome_vlm import algorithms
from pitome_vlm.merge.config import MergeConfig
from pitome_vlm.merge import MergeContext, make_plan

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) / 1024

algorithm, keys = algorithms.get(sys.argv[1]), torch.randn(1, 16384, int(sys.argv[2]))
ctx = MergeContext(MergeConfig(keep=0.5), depth=0.2)
make_plan(algorithm, keys[:, :64], 32, ctx=ctx).apply(keys[:, :64])
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
make_plan(algorithm, keys, 8192, ctx=ctx).apply(keys)
print(status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("name", "width"), [("pitome", 64), ("tome", 64)])
def test_a_plan_of_16384_tokens_takes_less_than_256_mb(name, width):
    # Made and applied. All N x N cosines would be 1024 MiB, those between two halves 256 MiB.
    words = [sys.executable, "-c", PEAK, name, str(width)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 0 < float(done.stdout) < 256 * 1e6 / 2**20
