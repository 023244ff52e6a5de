"""What a call needs to know is worked out once: schedules, calibrations and calls are counted."""

from __future__ import annotations

import pytest
import torch
from calls import package_calls
from tiny import tiny_batch, tiny_model
from tiny_anyres import anyres_batch, anyres_model
from tiny_qwen import qwen, qwen_batch
from tiny_video import video_batch, video_model, video_pixels

import pitome_vlm

MOST_CALLS_PER_TOKEN = 5
# What is asked once per call: function of the package that answers it.
ONCE = ("build_schedule", "resolve", "get")


def llava():
    return tiny_model(), tiny_batch()


def llava_next():
    model = anyres_model("next")
    return model, anyres_batch(model)


def onevision_video():
    model = video_model("onevision")
    return model, video_batch(model, video_pixels())


def qwen2_5_vl():
    model = qwen()
    return model, qwen_batch(model, [[(1, 8, 8)], [(1, 4, 12)]])


FAMILIES = (llava, llava_next, onevision_video, qwen2_5_vl)


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.__name__)
def family(request):
    return request.param()


def calls_of_generate(model, batch, tokens, **options):
    with package_calls() as calls:
        model.generate(
            **batch, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, **options
        )
    return calls


def test_wrap_asks_once(family):
    model, _ = family
    with package_calls() as calls:
        pitome_vlm.wrap(model, keep=0.25)
    pitome_vlm.unwrap(model)
    assert {name: calls.count(name) for name in ONCE} == dict.fromkeys(ONCE, 1)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 2}, {"cache_implementation": "static", "disable_compile": True}]
)
def test_generate_asks_once_and_a_token_costs_few_calls(family, options):
    model, batch = family
    pitome_vlm.wrap(model, keep=0.25)
    # Before it is counted, so that what is looked up once per process does not count.
    calls_of_generate(model, batch, 2, **options)
    short, long = (calls_of_generate(model, batch, n, **options) for n in (3, 8))
    pitome_vlm.unwrap(model)
    assert {name: long.count(name) for name in ONCE} == dict.fromkeys(ONCE, 1)
    further = long.made[len(short.made) - len(long.made) :]
    assert len(further) <= 5 * MOST_CALLS_PER_TOKEN, further


def test_text_alone_costs_few_calls_per_token():
    model = pitome_vlm.wrap(tiny_model(), keep=0.25)
    batch = {"input_ids": torch.tensor([[1, 5, 6]]), "attention_mask": torch.ones(1, 3)}
    calls_of_generate(model, batch, 2)
    short, long = (len(calls_of_generate(model, batch, n).made) for n in (3, 8))
    assert long - short <= 5 * MOST_CALLS_PER_TOKEN


def test_leaving_out_unused_layers_asks_once():
    model, batch = llava()
    pitome_vlm.wrap(model, keep=1.0, skip_unused_layers=True)
    calls = calls_of_generate(model, batch, 2)
    with package_calls() as forward:
        model(**batch)
    assert calls.count("build_schedule") <= 2  # generate, and its one pass over images
    assert forward.count("build_schedule") == 1
