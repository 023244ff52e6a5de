"""Models whose projector pools patches (InternVL, Gemma 3) are answered as by the library."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("vllm.version", reason="make test-vllm builds an environment with vLLM")

from compared import answers, check_varied
from served_pooled import CONFIG, MARKS, WRITTEN, library, pooled_requests, save_pooled
from served_tiled import PARALLEL, refused_requests, save_images

from pitome_vlm.releases import RELEASE, features_from

# vLLM sets room aside for an image (and a video) of the most tiles.
LENGTHS = {"internvl": 1400, "gemma3": 600}
# One runs in two processes, each with half of the heads; in one something is wrong on purpose.
HOW = {"internvl": PARALLEL, "gemma3": {"controls": ["compact decoding", "no sizes"]}}
# Answers that the library changes, too, with the last bits of the pixels.
MOST_TIES = 1


@pytest.mark.parametrize("kind", LENGTHS)
def test_answers_are_the_library_s(engine, tmp_path, kind):
    """One batch in which requests have other budgets, and once more from the cache."""
    path = save_pooled(tmp_path / kind, kind)
    images = save_images(tmp_path / "images")
    requests = pooled_requests(kind, images)
    first, second, *controls = engine(
        path,
        requests,
        CONFIG,
        passes=2,
        max_keep=1.0,
        max_num_batched_tokens=64,
        max_model_len=LENGTHS[kind],
        block_size=32,
        enable_prefix_caching=True,
        refused=refused_requests(images, kind),
        mark=MARKS[kind],
        **HOW[kind],
    )
    written = [[tuple(one) for one in own] for own in json.loads(WRITTEN.read_text())[kind]]
    expected = [own[0] for own in written]
    if features_from(kind) <= RELEASE:
        assert library(kind, path, requests) == expected, "run served_pooled.py to write them again"
        whole = [number for number, one in enumerate(requests) if one["pitome"] == {"keep": 1.0}]
        stock = library(kind, path, [requests[number] for number in whole], merged=False)
        assert [expected[number] for number in whole] == stock
    check_varied(expected)
    for found in (answers(first), answers(second)):
        assert all(one in own for one, own in zip(found, written, strict=True))
        assert sum(one != own for one, own in zip(found, expected, strict=True)) <= MOST_TIES
    # All prompts of more than a block; a quarter of an image of Gemma 3 is less.
    assert sum(one["cached_tokens"] > 0 for one in second) >= 12
    for control in controls:
        # Only text, and what keeps all its tokens, is answered as before.
        same = [one in own for one, own in zip(answers(control), written, strict=True)]
        merged = [one["images"] and one["pitome"] != {"keep": 1.0} for one in requests]
        assert sum(is_same for is_same, own in zip(same, merged, strict=True) if own) <= 1
