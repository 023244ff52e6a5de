"""A loaded model class of the lmms-eval plugin."""

from __future__ import annotations

import pytest
from lmms_requests import QUARTER

from pitome_vlm.demo import load_split
from pitome_vlm.lmms.arguments import ModelArguments
from pitome_vlm.lmms.tasks import demo_vqa


@pytest.fixture(scope="module")
def docs():
    return demo_vqa.records(load_split("test", 40))


@pytest.fixture(scope="module")
def build(docs):
    """A model class with the demo documents, as lmms-eval leaves it before the first request."""
    from pitome_vlm.lmms.model import PitomeLlava, PitomeLlavaSimple

    def build(simple=False, **arguments):
        cls = PitomeLlavaSimple if simple else PitomeLlava
        lm = cls(**{"pretrained": "demo", "keep": 0.25, "batch_size": 4} | arguments)
        lm.task_dict = {"demo_vqa": {"test": docs}}
        return lm

    return build


@pytest.fixture(scope="module")
def shared(build):
    return build()


@pytest.fixture(scope="module")
def shared_simple(build):
    return build(simple=True)


@pytest.fixture
def lm(shared):
    return as_built(shared)


@pytest.fixture
def simple_lm(shared_simple):
    return as_built(shared_simple)


def as_built(lm):
    lm.reconfigure(QUARTER)
    lm.arguments = ModelArguments.parse({"pretrained": "demo", "batch_size": 4})
    lm.system_prompt = None
    return lm
