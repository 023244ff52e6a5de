"""When what vLLM answers is what the library answers, and for which merge options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from served_models import Library, pixels_of

from pitome_vlm import MergeConfig
from pitome_vlm.merge import algorithms

# Compared by keys, which tensor parallelism spreads over processes, and answers depend on it.
BY_KEYS = MergeConfig(keep=0.25, algorithm="pitome", metric="keys")
EVERY_ALGORITHM = [
    *({"algorithm": name, "tokens": 36} for name in algorithms.available() if name != "none"),
    {"algorithm": "pitome", "ratio": 0.9},
    {"algorithm": "pitome", "keep": 0.25, "stage": "projector"},
    {"algorithm": "pitome", "keep": 0.1, "stage": "both", "metric": "hidden"},
    {"algorithm": "tome", "keep": 0.5, "placement": "after_layer", "layers": [1, 3]},
    {"algorithm": "pitome", "keep": 0.5, "proportional_attention": False, "weighted": False},
]
# Of 15 options times 48 images; see `check_features`.
MOST_TIES = 12
# VisPruner removes duplicates in the order of their similarity, and the equal patches of a drawn
# scene are all similar to the last bit; of its 48.
MOST_TIES_OF_VISPRUNER = 8
# Of some 20 answers about eight images, on any machine; see `check_answers`.
MOST_ANSWERS = 3
# Of noise in the last bits of pixels.
DRAWS = 8


def answers(outputs):
    return [(one["prompt_tokens"], one["answer"]) for one in outputs]


def check_varied(expected):
    """Answers depend on what was asked, without which their equality says little."""
    assert len({tuple(answer) for _, answer in expected}) >= 3


def check_answers(passes: list, expected: list, library: Callable[[list[int], Any], list]) -> None:
    """Answers of every pass are the library's, but where the last bit of a pixel decides.

    Of two tokens that are equally redundant up to rounding either may merge, and which it is
    differs by machine. The library itself then answers as vLLM does for some other last bits.

    Args:
        passes: vLLM's.
        expected: the library's answers.
        library: numbers of requests and a generator of noise to the library's answers to those.
    """
    check_varied(expected)
    found = [answers(one) for one in passes]
    assert all(len(one) == len(expected) for one in found)
    differing = sorted(
        {number for one in found for number, own in enumerate(one) if own != expected[number]}
    )
    assert len(differing) <= MOST_ANSWERS, differing
    noise = torch.Generator().manual_seed(0)
    draws = [library(differing, noise) for _ in range(DRAWS)] if differing else []
    for place, number in enumerate(differing):
        allowed = [expected[number], *(one[place] for one in draws)]
        assert all(one[number] in allowed for one in found), (
            number,
            [one[number] for one in found],
        )


def check_equal(passes, features, path, expected):
    """Answers of every pass, and visual tokens under `EVERY_ALGORITHM`, are the library's."""
    check_varied(expected)
    assert [answers(one) for one in passes] == [expected] * len(passes)
    check_features(features, path, EVERY_ALGORITHM)


def check_features(found, path, options):
    """Equal for every image, except where merges hang on the last bit of a float32.

    Energies of two tokens may lie closer together than rounding (8e-8 apart where either kernel is
    wrong by 3e-7), and what follows in the order of energies then changes sides. The library
    itself decides about such an image either way when the last bits of its pixels change.
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
    of_vispruner = [one for one in ties if one[0] == "vispruner"]
    assert len(of_vispruner) <= MOST_TIES_OF_VISPRUNER, ties
    assert len(ties) - len(of_vispruner) <= MOST_TIES, ties
