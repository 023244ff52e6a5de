"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images of any size are answered as by the library."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm.version", reason="make test-vllm builds an environment with vLLM")

from compared import answers, check_varied
from PIL import Image
from served_grids import grid_requests, save_grids
from served_tiled import reference_tiled, save_images
from test_tiled import check_names

from pitome_vlm import MergeConfig

KINDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
CONFIG = MergeConfig(keep=0.25)
# What every fourth request asks for.
BUDGETS = [None, {"keep": 1.0}, {"tokens": 5}, {"keep": 1 / 3}]
CONTROLS = ("compact decoding", "no sizes", "no places")
# In one of them something is wrong on purpose.
HOW = {"qwen2_vl": {}, "qwen2_5_vl": {"controls": CONTROLS}, "qwen3_vl": {}}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return save_images(tmp_path_factory.mktemp("grid_images"))


def refused(images, folder):
    """Requests that cannot be answered, with what is said to them."""
    thin = folder / "thin.png"
    Image.new("RGB", (1, 400)).save(thin)
    prompt = {"prompt": "<start><image><end> what is this", "images": images[:1]}
    return [
        ({**prompt, "pitome": {"keep": 2}}, "keep must be in (0, 1]"),
        ({**prompt, "pitome": {"keep": "auto"}}, "keep='auto' is not served"),
        ({**prompt, "images": [str(thin)]}, "aspect ratio"),
        ({"prompt": "<video> what", "images": [], "frames": images[:4]}, "At most 0 video"),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_the_library_s(engine, images, tmp_path, kind):
    """One batch in which requests have other budgets, and once more from the cache."""
    path, requests = save_grids(tmp_path / kind, kind), grid_requests(images)
    requests = [{**one, "pitome": BUDGETS[number % 4]} for number, one in enumerate(requests)]
    found = engine(
        path,
        requests,
        CONFIG,
        passes=2,
        max_keep=1.0,
        # Images are split over steps.
        max_num_batched_tokens=40,
        block_size=32,
        enable_prefix_caching=True,
        refused=refused(images, tmp_path),
        **HOW[kind],
    )
    expected = reference_tiled(path, requests, CONFIG)
    check_varied(expected)
    assert [answers(one) for one in found[:2]] == [expected] * 2
    assert sum(one["cached_tokens"] > 0 for one in found[1]) >= 6
    # Where nothing is merged on request, answers are those of the model itself.
    whole = [one for one in requests if one["pitome"] == {"keep": 1.0}]
    stock = reference_tiled(path, whole, None)
    assert [one for one, asked in zip(expected, requests, strict=True) if asked in whole] == stock
    check_names(requests, found[0])
    for wrong in found[2:]:
        pairs = zip(answers(wrong), expected, strict=True)
        assert sum(own == other for own, other in pairs) <= 12
