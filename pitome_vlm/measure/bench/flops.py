"""The formulas of `costs` against what PyTorch counts while it computes."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..accounting import costs
from .measurement import installed
from .prompts import Budget, Case, inputs_for


@torch.no_grad()
def counted_over_formula(model: Any, budget: Budget, case: Case) -> float:
    """FLOPs of one prompt: PyTorch's count over the formula, between 0.99 and 1.01."""
    words, images = case.text_tokens, case.images
    inputs = inputs_for(model, Case(1, words, images=images, **case.shown))
    with installed(model, budget):
        counter = FlopCounterMode(display=False)
        # The CPU's fused attention kernel is unknown to the counter; the plain one is not.
        with counter, sdpa_kernel(SDPBackend.MATH):
            model(**inputs, logits_to_keep=1)
        expected = costs(model, text_tokens=words, images=images, **case.shown).total_flops
    return float(counter.get_total_flops()) / expected
