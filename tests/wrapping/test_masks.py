"""Causal masks made in a short way are what transformers makes."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model
from transformers import DynamicCache

from pitome_vlm.wrapping.masks import Masks, additive_mask


class AnotherCache(DynamicCache):
    """Not the class that the short way knows."""


def filled(cache, columns, rows=3):
    cache.update(torch.zeros(rows, 1, columns, 4), torch.zeros(rows, 1, columns, 4), 0)
    return cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_short_way_is_transformers_own(dtype):
    model = tiny_model("clip")
    masks = Masks.of(model, model.config.text_config)
    assert masks.sees_all
    generator = torch.Generator().manual_seed(0)
    bias = torch.randint(1, 9, (3, 7), generator=generator).float().log()
    left = torch.ones(3, 12, dtype=torch.long)
    left[1, :4] = left[2, :9] = 0
    between = torch.ones(3, 12, dtype=torch.long)
    between[1, 5:8] = 0
    for total in (6, 7, 8, 12):
        for mask in (None, left[:, :total], between[:, :total], torch.ones(3, total)):
            found, expected = (
                additive_mask(
                    masks,
                    bias,
                    batch=3,
                    queries=1,
                    dtype=dtype,
                    device=bias.device,
                    attention_mask=mask,
                    cache=filled(kind(), total - 1),
                )
                for kind in (DynamicCache, AnotherCache)
            )
            assert found.shape == (3, 1, 1, total)
            padded = torch.zeros(3, total, dtype=torch.bool) if mask is None else mask == 0
            torch.testing.assert_close(
                found[:, 0, 0][~padded], expected[:, 0, 0][~padded], atol=0, rtol=0
            )
            assert (found[:, 0, 0][padded] < -1e30).all()
            # A row of padding alone cannot ask for a token.
            asking = ~padded[:, -1]
            assert (expected[asking, 0, 0][padded[asking]] < -1e30).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_short_way_of_a_prompt_is_transformers_own(dtype):
    model = tiny_model("clip")
    masks = Masks.of(model, model.config.text_config)
    bias = torch.randint(1, 9, (3, 7), generator=torch.Generator().manual_seed(0)).float().log()
    left = torch.ones(3, 12, dtype=torch.long)
    left[1, :4] = left[2, :9] = 0
    for queries in (2, 5, 12):
        for mask in (None, left, left.flip(1), torch.ones(3, 12)):
            found, expected = (
                additive_mask(
                    masks,
                    bias,
                    batch=3,
                    queries=queries,
                    dtype=dtype,
                    device=bias.device,
                    attention_mask=mask,
                    cache=filled(kind(), 12 - queries),
                )
                for kind in (DynamicCache, AnotherCache)
            )
            torch.testing.assert_close(found.expand_as(expected), expected, atol=0, rtol=0)
            assert bool((found < -1e30).any())
