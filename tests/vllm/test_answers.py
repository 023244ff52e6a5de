"""What vLLM answers with merged tokens is what the library answers for the same config."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm.version", reason="make test-vllm builds an environment with vLLM")

import torch
from compared import EVERY_ALGORITHM, answers, check_features, check_varied
from served_models import pixels_of, reference

from pitome_vlm import MergeConfig


def test_demo_with_chunked_prefill_and_prefix_cache(engine, demo, requests, tmp_path):
    config = MergeConfig(keep=0.25)
    expected = reference(demo, requests, config)
    torch.save(pixels_of(demo), tmp_path / "pixels.pt")
    (first, second), features = engine(
        demo,
        requests,
        config,
        passes=2,
        features=EVERY_ALGORITHM,
        pixels=tmp_path / "pixels.pt",
        block_size=32,
        max_num_batched_tokens=40,
        enable_prefix_caching=True,
    )
    check_varied(expected)
    assert answers(first) == expected
    assert answers(second) == expected
    # The 36 tokens of a picture lie in more than one chunk and in whole blocks of the cache.
    assert all(one["cached_tokens"] > 0 for one in second[:3])
    check_features(features, demo, EVERY_ALGORITHM)


def test_keep_everything_is_stock_vllm(engine, demo, requests):
    unreduced = engine(demo, requests, MergeConfig(keep=1.0))[0]
    stock = engine(demo, requests)[0]
    check_varied(answers(stock))
    assert answers(unreduced) == answers(stock) == reference(demo, requests, None)
    # Caches of pictures must not mix what was merged otherwise.
    ours, theirs = names_of(unreduced), names_of(stock)
    assert len(ours) == len(theirs) == 3
    assert not ours & theirs


def names_of(outputs):
    return {name for one in outputs for name in one["picture_names"]}


def test_siglip(engine, tiny_siglip, requests, tmp_path):
    config = MergeConfig(keep=0.25)
    expected = reference(tiny_siglip, requests, config)
    torch.save(pixels_of(tiny_siglip), tmp_path / "pixels.pt")
    (found,), features = engine(
        tiny_siglip,
        requests,
        config,
        features=EVERY_ALGORITHM,
        pixels=tmp_path / "pixels.pt",
    )
    check_varied(expected)
    assert answers(found) == expected
    check_features(features, tiny_siglip, EVERY_ALGORITHM)
