"""FLOPs of language models whose layers are not all attention, against what torch counts."""

from __future__ import annotations

import pytest
import torch
from refused_family import else_refused
from tiny_families import FAMILIES
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pitome_vlm.measure.flops import linear_flops
from pitome_vlm.measure.language_flops import prefill_flops


@else_refused("qwen3_5", "lfm2_vl", "minicpmv4_6", "gemma3", "qwen3_vl")
@torch.no_grad()
def test_the_prefill_is_what_is_computed():
    for name in ("qwen3_5", "lfm2_vl", "minicpmv4_6", "gemma3", "qwen3_vl"):
        model = FAMILIES[name].model()
        for n_tokens in (40, 150):
            ids = torch.full((1, n_tokens), 3)
            # The CPU's fused attention kernel is unknown to the counter; the plain one is not.
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                model(input_ids=ids)
            # One row of logits, which not every family can be asked for.
            every_row = n_tokens * linear_flops(model.lm_head)
            expected = counter.get_total_flops() - every_row + linear_flops(model.lm_head)
            assert prefill_flops(model, n_tokens) == pytest.approx(expected, rel=1e-3), name
