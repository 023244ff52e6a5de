"""Plans of very many tokens: made piece by piece, the same as from the whole matrix."""

from __future__ import annotations

import pytest
import torch

from pitome_vlm import algorithms
from pitome_vlm.algorithms import similarity
from pitome_vlm.config import MergeConfig
from pitome_vlm.merge import MergeContext, make_plan

OPTIONS = {
    "pitome": {"algorithm": "pitome"},
    "pitome, nothing protected": {"algorithm": "pitome", "protect": False},
    "pitome, elu, energy order": {"algorithm": "pitome", "energy": "elu", "restore_order": False},
    "pitome, gaussian": {"algorithm": "pitome", "energy": "gaussian"},
    "pitome_plus": {"algorithm": "pitome_plus"},
    "pitome_plus, energy order": {"algorithm": "pitome_plus", "restore_order": False},
}


def plan_of(keys, n_out, options, **context):
    config = MergeConfig(tokens=n_out, **options)
    ctx = MergeContext(config, layer=2, depth=0.3, **context)
    return make_plan(algorithms.get(config.algorithm), keys, n_out, ctx=ctx)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("n_out", [150, 60])
def test_pieces_make_the_plan_of_the_whole_matrix(monkeypatch, options, n_out):
    # float64, where no two scores are apart by rounding alone.
    torch.manual_seed(n_out)
    keys = torch.randn(2, 203, 16, dtype=torch.float64) + 0.5
    expected = plan_of(keys, n_out, options, n_leading=1)
    monkeypatch.setattr(similarity, "WHOLE", 10)
    monkeypatch.setattr(similarity, "PIECE_BYTES", 200 * 2 * 8 * 37)
    found = plan_of(keys, n_out, options, n_leading=1)
    assert torch.equal(found.assign, expected.assign)
    assert torch.equal(found.kept, expected.kept)


def test_coverage_in_pieces_keeps_duplicates_apart_last(monkeypatch):
    keys = torch.randn(1, 12, 8, dtype=torch.float64).repeat(1, 3, 1)
    expected = plan_of(keys, 12, {"algorithm": "pitome_plus"}, at_projector=True)
    monkeypatch.setattr(similarity, "WHOLE", 10)
    found = plan_of(keys, 12, {"algorithm": "pitome_plus"}, at_projector=True)
    # One of every triple stays, whichever way the distances were made.
    assert sorted(found.kept[0].remainder(12).tolist()) == list(range(12))
    assert sorted(expected.kept[0].remainder(12).tolist()) == list(range(12))


@pytest.mark.parametrize("name", ["pitome", "pitome_plus"])
def test_no_tensor_of_a_large_plan_is_near_the_whole_matrix(name):
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for one in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(one, torch.Tensor) and not func.is_view:
                    self.largest = max(self.largest, one.numel() * one.element_size())
            return out

    n_tokens = similarity.WHOLE + 500
    with Largest() as seen:
        plan = plan_of(torch.randn(1, n_tokens, 8), n_tokens - 300, {"algorithm": name})
    assert plan.n_out == n_tokens - 300
    assert seen.largest <= 1.1 * similarity.PIECE_BYTES < n_tokens**2 * 4 / 4
