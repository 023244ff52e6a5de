"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5: images of any size are answered as by the library."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("vllm.version", reason="make test-vllm builds an environment with vLLM")

from compared import answers, check_answers
from PIL import Image
from served_grids import CONFIGS, MARK, WRITTEN, grid_requests, save_grids, write_answers
from served_models import save_adapter
from served_tiled import PARALLEL, reference_tiled, refused_requests, save_images
from test_tiled import check_names

from pitome_vlm.releases import RELEASE, features_from

CONTROLS = ("compact decoding", "no sizes", "no places")
# By case the model and its engine. Some run in two processes, each with half of the heads; in one
# something is wrong on purpose; the layers of one are compiled, and it is asked once more with an
# adapter.
CASES = {
    "qwen2_vl": ("qwen2_vl", PARALLEL),
    "qwen2_5_vl": (
        "qwen2_5_vl",
        {"enforce_eager": False, "enable_lora": True, "max_lora_rank": 8},
    ),
    "qwen3_vl": ("qwen3_vl", {"controls": CONTROLS}),
    "qwen3_vl in two": ("qwen3_vl", {**PARALLEL, "refused": ()}),
}
if features_from("qwen3_5") <= RELEASE:
    # The stand-in for linear attention is of vLLM 0.32.
    CASES["qwen3_5"] = ("qwen3_5", {**PARALLEL, "linear_attention": True})


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return save_images(tmp_path_factory.mktemp("grid_images"))


def refused(images, folder):
    """Requests that cannot be answered, with what is said to them."""
    thin = folder / "thin.png"
    Image.new("RGB", (1, 400)).save(thin)
    asked = {"prompt": "what is this", "images": images[:1]}
    return [
        ({**asked, "pitome": {"keep": "auto"}}, "keep='auto' is not served"),
        ({**asked, "images": [str(thin)]}, "Failed to apply"),
        *refused_requests(images, "grid"),
    ]


def library_answers(kind, path, requests):
    """Those that are written down where it wraps no such model on this release of transformers."""
    kept = json.loads(WRITTEN.read_text())
    written = [tuple(one) for one in kept[kind]] if kind in kept else None
    if written is not None and features_from(kind) > RELEASE:
        return written
    found = reference_tiled(path, requests, CONFIGS[kind])
    assert written in (None, found), f"run {write_answers.__module__}.py to write them down again"
    return found


@pytest.mark.parametrize("case", CASES)
def test_answers_are_the_library_s(engine, images, tmp_path, case):
    """One batch in which requests have other budgets, and once more from the cache."""
    kind, how = CASES[case]
    path, requests = save_grids(tmp_path / kind, kind), grid_requests(images)
    adapters = []
    if how.get("enable_lora"):
        adapters.append(save_adapter(path, tmp_path / "adapter"))
    first, second, *others = engine(
        path,
        requests,
        CONFIGS[kind],
        passes=2,
        adapters=adapters,
        max_keep=1.0,
        # Images are split over steps.
        max_num_batched_tokens=40,
        block_size=32,
        enable_prefix_caching=True,
        mark=MARK,
        **{"refused": refused(images, tmp_path), **how},
    )
    expected = library_answers(kind, path, requests)

    def library(numbers, noise):
        some = [requests[one] for one in numbers]
        return reference_tiled(path, some, CONFIGS[kind], noise=noise)

    check_answers((first, second), expected, library)
    assert sum(one["cached_tokens"] > 0 for one in second) >= 6
    # Where nothing is merged on request, answers are those of the model itself.
    whole = [one for one in requests if one["pitome"] == {"keep": 1.0}]
    stock = reference_tiled(path, whole, None)
    assert [one for one, asked in zip(expected, requests, strict=True) if asked in whole] == stock
    check_names(requests, first)
    for adapter in adapters:
        adapted = reference_tiled(path, requests, CONFIGS[kind], adapter=adapter)
        assert answers(others.pop(0)) == adapted
        assert sum(own == other for own, other in zip(adapted, expected, strict=True)) <= 2
    for wrong in others:
        pairs = zip(answers(wrong), expected, strict=True)
        assert sum(own == other for own, other in pairs) <= 12
