"""What merging launches on a device, counted as operators: no time is taken, so no noise."""

from __future__ import annotations

import pytest
import torch

import pitome_vlm
from pitome_vlm.measure.kernels import KernelCount, count_kernels
from scripts.speed import kernels

# Kernels of the merged tower over those of the unmerged one, by default at keep=0.25.
MOST = 1.5
# Of one plan, carried out; pitome_plus: of one round of at most a quarter of the tokens.
MOST_PER_STEP = {"pitome": 36, "tome": 45, "pitome_plus": 40}


@pytest.fixture(scope="module")
def tower():
    return kernels.narrow_tower(), torch.zeros(1, 3, 336, 336)


def test_views_and_bare_memory_are_no_kernels():
    x = torch.ones(4, 4)
    found = count_kernels(lambda: (x.T.reshape(2, 8)[1:] + x.new_empty(1, 8)).sum())
    assert found.by_name == {"aten::clone": 1, "aten::add": 1, "aten::sum": 1}
    with KernelCount() as found:
        torch.mm(x, x)
    assert (found.total, found.bytes) == (1, 3 * 64)


def test_the_merged_tower_launches_little_more_than_the_unmerged_one(tower):
    model, pixels = tower
    base = kernels.Parts(model, pixels)
    assert not base.steps
    with pitome_vlm.wrapped(model, keep=0.25):
        merged = kernels.Parts(model, pixels)
    assert len(merged.steps) == 2
    assert base.tower < merged.tower <= MOST * base.tower, (merged.tower, base.tower)


def test_a_step_launches_few_kernels(tower):
    model, pixels = tower
    for name, most in MOST_PER_STEP.items():
        # The first step finds no sizes, the second one does.
        options = {"algorithm": name, "stage": "tower", "layers": (0, 1)}
        with pitome_vlm.wrapped(model, keep=0.6, **options):
            steps = kernels.Parts(model, pixels).steps
        assert len(steps) == 2
        assert all(step.total <= most for step in steps), (name, [step.by_name for step in steps])
