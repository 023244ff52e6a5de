"""Run with TRITON_INTERPRET=1: the Triton kernel interpreted, against a loop over numbers."""

from __future__ import annotations

import math

import torch

from pitome_vlm.merge import greedy_kernel


def in_turn(distance: list[list[float]], choice: int, n_out: int) -> list[int]:
    chosen = [choice]
    while len(chosen) < n_out:
        nearest = [min(distance[one][token] for one in chosen) for token in range(len(distance))]
        chosen.append(max(range(len(distance)), key=lambda token: (nearest[token], -token)))
    return chosen


def check(batch: int, n_tokens: int, n_out: int, dtype: torch.dtype) -> None:
    keys = torch.randn(batch, n_tokens, 6, generator=torch.Generator().manual_seed(n_tokens))
    # Copies, so that there are ties.
    keys = keys[:, torch.arange(n_tokens) % max(1, n_tokens // 2)]
    unit = torch.nn.functional.normalize(keys, dim=-1)
    distance = (1 - unit @ unit.mT).to(dtype)
    distance.diagonal(0, -2, -1).fill_(-math.inf)
    first = torch.arange(batch) % n_tokens
    found = greedy_kernel.farthest_first(distance, first, n_out)
    wanted = [
        in_turn(one.tolist(), int(choice), n_out)
        for one, choice in zip(distance, first, strict=True)
    ]
    assert found.tolist() == wanted, (batch, n_tokens, n_out, dtype)


for dtype in (torch.float32, torch.float64):
    for batch, n_tokens, n_out in ((1, 1, 1), (2, 16, 16), (3, 17, 5), (1, 70, 1), (1, 130, 40)):
        check(batch, n_tokens, n_out, dtype)
