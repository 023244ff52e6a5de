"""What vLLM answers with merged tokens is what the library answers for the same config."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="make test-vllm builds an environment with vLLM")

import torch
from served_models import noise_of, reference, reference_features

from pitome_vlm import MergeConfig, algorithms

# Compared by keys, which tensor parallelism spreads over processes, and answers depend on it.
BY_KEYS = MergeConfig.preset("paper", keep=0.25)
EVERY_ALGORITHM = [
    *({"algorithm": name, "tokens": 36} for name in algorithms.available() if name != "none"),
    {"algorithm": "pitome", "ratio": 0.9},
    {"algorithm": "pitome", "keep": 0.25, "stage": "projector"},
    {"algorithm": "pitome", "keep": 0.1, "stage": "both", "metric": "hidden"},
    {"algorithm": "tome", "keep": 0.5, "placement": "after_layer", "layers": [1, 3]},
    {"algorithm": "pitome", "keep": 0.5, "proportional_attention": False, "weighted": False},
]


def answers(outputs):
    return [(one["prompt_tokens"], one["answer"]) for one in outputs]


def check_varied(expected):
    """Answers depend on what was asked, without which their equality says little."""
    assert len({tuple(answer) for _, answer in expected}) >= 3


def check_features(found, path, options):
    expected = reference_features(path, options, noise_of(path))
    for config, ours, theirs in zip(options, found, expected, strict=True):
        difference = (ours - theirs).abs().max() / theirs.abs().max()
        assert difference < 1e-4, (config, difference)


def test_demo_with_chunked_prefill_and_prefix_cache(engine, demo, requests, tmp_path):
    config = MergeConfig(keep=0.25)
    expected = reference(demo, requests, config)
    torch.save(noise_of(demo), tmp_path / "pixels.pt")
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
    unreduced = answers(engine(demo, requests, MergeConfig(keep=1.0))[0])
    stock = answers(engine(demo, requests)[0])
    check_varied(stock)
    assert unreduced == stock == reference(demo, requests, None)


def test_names_of_transformers_5_in_a_process_of_its_own(engine, tiny, requests):
    expected = reference(tiny, requests, BY_KEYS)
    (found,) = engine(tiny, requests, BY_KEYS, several=True)
    check_varied(expected)
    assert answers(found) == expected


def test_tensor_parallel(engine, tiny, requests):
    """Without the all-reduce of the mean keys every answer about a picture is another one."""
    expected = reference(tiny, requests, BY_KEYS)
    (found,) = engine(
        tiny,
        requests,
        BY_KEYS,
        several=True,
        env={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
        tensor_parallel_size=2,
    )
    assert answers(found) == expected


def test_siglip(engine, tiny_siglip, requests, tmp_path):
    config = MergeConfig(keep=0.25)
    expected = reference(tiny_siglip, requests, config)
    torch.save(noise_of(tiny_siglip), tmp_path / "pixels.pt")
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
