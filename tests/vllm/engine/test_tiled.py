"""LLaVA-NeXT and LLaVA-OneVision: images of any size and videos are answered as by the library."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm.version", reason="make test-vllm builds an environment with vLLM")

from compared import check_answers
from served_tiled import (
    PARALLEL,
    reference_tiled,
    refused_requests,
    save_images,
    save_tiled,
    tiled_requests,
    video_requests,
)

from pitome_vlm import MergeConfig

KINDS = ("llava_next", "llava_onevision")
# Steps of as many tokens; most prompts are longer, so that images are split. vLLM takes an image of
# 1153 x 944 pixels for the one with most tokens of OneVision, which it is not with small tiles, and
# sets room aside for it.
CHUNKS = {"llava_next": 64, "llava_onevision": 180}
# The server's own, and those that every fourth request asks for.
CONFIG, MAX_KEEP = MergeConfig(keep=0.25), {"llava_next": 1.0, "llava_onevision": 0.5}
BUDGETS = {
    "llava_next": [None, {"keep": 1.0}, {"tokens": 20}, {"keep": 1 / 3}],
    "llava_onevision": [None, {"keep": 0.5}, {"tokens": 9}, {"keep": "auto"}],
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return save_images(tmp_path_factory.mktemp("tiled_images"))


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_the_library_s(engine, images, tmp_path, kind):
    """One batch of several budgets, in two processes, and once more from the cache."""
    path, requests = save_tiled(tmp_path / kind, kind), tiled_requests(images)
    if kind == "llava_onevision":
        requests += video_requests(images)
    requests = [{**one, "pitome": BUDGETS[kind][number % 4]} for number, one in enumerate(requests)]
    passes = engine(
        path,
        requests,
        CONFIG,
        passes=2,
        max_keep=MAX_KEEP[kind],
        max_num_batched_tokens=CHUNKS[kind],
        max_model_len=1400,
        block_size=32,
        enable_prefix_caching=True,
        refused=refused_requests(images, kind),
        **PARALLEL,
    )
    expected = reference_tiled(path, requests, CONFIG)

    def library(numbers, noise):
        return reference_tiled(path, [requests[one] for one in numbers], CONFIG, noise=noise)

    check_answers(passes, expected, library)
    # All prompts of more than a block.
    assert sum(one["cached_tokens"] > 0 for one in passes[1]) >= 15
    # Where nothing is merged on request, answers are those of the model itself.
    whole = [one for one in requests if one["pitome"] == {"keep": 1.0}]
    stock = reference_tiled(path, whole, None)
    assert [one for one, asked in zip(expected, requests, strict=True) if asked in whole] == stock
    check_names(requests, passes[0])


def check_names(requests, outputs):
    """An image is cached under a name of its own for every budget."""
    named = {}
    for request, output in zip(requests, outputs, strict=True):
        for path, name in zip(request["images"], output["image_names"], strict=False):
            named.setdefault((path, str(request["pitome"])), set()).add(name)
    assert all(len(names) == 1 for names in named.values())
    assert len({name for names in named.values() for name in names}) == len(named)
