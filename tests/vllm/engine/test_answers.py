"""What vLLM answers with merged tokens is what the library answers for the same config."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm.version", reason="make test-vllm builds an environment with vLLM")

from compared import EVERY_ALGORITHM, answers, check_equal, check_varied
from served_models import reference

from pitome_vlm import MergeConfig


def test_demo_with_chunked_prefill_and_prefix_cache(engine, demo, requests):
    config = MergeConfig(keep=0.25)
    # The first image again, with less of it.
    requests = [*requests, {**requests[0], "pitome": {"tokens": 18}}]
    passes, features = engine(
        demo,
        requests,
        config,
        passes=2,
        controls=["compact decoding", "no sizes"],
        features=EVERY_ALGORITHM,
        block_size=32,
        max_num_batched_tokens=40,
        enable_prefix_caching=True,
    )
    expected = reference(demo, requests, config)
    check_equal(passes[:2], features, demo, expected)
    # The 36 tokens of an image lie in more than one chunk and in whole blocks of the cache.
    assert all(one["cached_tokens"] > 0 for one in passes[1][:3])
    for control in passes[2:]:
        found = answers(control)
        # Only text is answered as before.
        assert found[3] == expected[3]
        # One of them repeats a word to the end, which does not tell positions apart.
        assert sum(found[number] != expected[number] for number in range(3)) >= 2
    names = [one["image_names"] for one in passes[0]]
    assert names[0] == names[2] != names[4]


def test_keep_everything_is_stock_vllm(engine, demo, requests):
    unreduced = engine(demo, requests, MergeConfig(keep=1.0))[0]
    stock = engine(demo, requests)[0]
    check_varied(answers(stock))
    assert answers(unreduced) == answers(stock) == reference(demo, requests, None)
    # Cached images must not mix with those of another budget.
    ours, theirs = names_of(unreduced), names_of(stock)
    assert len(ours) == len(theirs) == 3
    assert not ours & theirs


def names_of(outputs):
    return {name for one in outputs for name in one["image_names"]}


def test_siglip_without_calibration(engine, tiny_siglip, requests):
    """vLLM's own heads and positions, and another tower."""
    config = MergeConfig.preset("paper", keep=0.25)
    passes, features = engine(tiny_siglip, requests, config, features=EVERY_ALGORITHM)
    check_equal(passes, features, tiny_siglip, reference(tiny_siglip, requests, config))
