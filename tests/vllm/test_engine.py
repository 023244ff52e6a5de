"""What vLLM answers with merged tokens is what the library answers for the same config."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm.version", reason="make test-vllm builds an environment with vLLM")

import torch
from served_models import NAMINGS, Library, pixels_of, reference, save_under_names

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
# Of 16 options times 48 pictures; see `check_features`.
MOST_TIES = 12


def answers(outputs):
    return [(one["prompt_tokens"], one["answer"]) for one in outputs]


def check_varied(expected):
    """Answers depend on what was asked, without which their equality says little."""
    assert len({tuple(answer) for _, answer in expected}) >= 3


def check_features(found, path, options):
    """Equal for every picture, but where merges hang on the last bit of a float32.

    Energies of two tokens may lie closer together than rounding (8e-8 apart where either kernel is
    wrong by 3e-7), and what follows in the order of energies then changes sides. The library
    itself decides such a picture either way when the last bits of its pixels change.
    """
    pixels, library = pixels_of(path), Library(path)
    ties = []
    for config, ours in zip(options, found, strict=True):
        theirs = library.features(config, pixels)
        tolerance = 1e-4 * theirs.abs().max()
        different = ((ours - theirs).abs().amax((1, 2)) >= tolerance).nonzero().flatten().tolist()
        for number in different:
            assert library.last_bit_decides(config, pixels[number], ours[number], tolerance), (
                config,
                number,
            )
        ties += [(config["algorithm"], number) for number in different]
    assert len(ties) <= MOST_TIES, ties


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


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming_of_weights(engine, tiny, requests, tmp_path, naming):
    path = save_under_names(tiny, tmp_path / "renamed", naming)
    (found,) = engine(path, requests, BY_KEYS)
    assert answers(found) == reference(tiny, requests, BY_KEYS)


def test_in_a_process_of_its_own(engine, tiny, requests):
    expected = reference(tiny, requests, BY_KEYS)
    (found,) = engine(tiny, requests, BY_KEYS, several=True)
    check_varied(expected)
    assert answers(found) == expected


def test_tensor_parallel(engine, tiny, requests, tmp_path):
    """Without the all-reduce of the mean keys every answer about a picture is another one."""
    expected = reference(tiny, requests, BY_KEYS)
    torch.save(pixels_of(tiny), tmp_path / "pixels.pt")
    (found,), features = engine(
        tiny,
        requests,
        BY_KEYS,
        features=EVERY_ALGORITHM,
        pixels=tmp_path / "pixels.pt",
        several=True,
        # Functions are sent to the processes, which vLLM does for tests only.
        env={"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"},
        tensor_parallel_size=2,
    )
    assert answers(found) == expected
    check_features(features, tiny, EVERY_ALGORITHM)


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
