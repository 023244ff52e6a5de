"""Shared by all tests: one thread per worker, no hub, no cut-off images, and a time budget."""

from __future__ import annotations

import os
import signal
import sys
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch
from hypothesis import settings
from PIL import ImageFile

torch.set_num_threads(1)
# A shell starts what it runs in the background with Ctrl-C ignored, which tests of Ctrl-C need.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Rules are checked, not times: a busy machine must not fail a test. The same draws in every run, so
# that a failure can be repeated; `make fuzz` draws anew.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.register_profile("fuzz", deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

# Seconds of processor time, those of child processes included. 0 is no limit, for runs that are
# slowed down (coverage, fuzzing).
BUDGET = float(os.environ.get("TEST_BUDGET", "2"))
# Seconds that `slowdown` takes on an idle machine of the kind that the budget is meant for.
REFERENCE = 0.13


def slowdown():
    """How many times longer than usual a fixed calculation takes now, at least 1.

    Processor time grows too where cores are slower or shared.
    """
    start = time.process_time()
    sum(i * i for i in range(2_000_000))
    return max(1.0, (time.process_time() - start) / REFERENCE)


@pytest.fixture(autouse=True)
def strict_images(monkeypatch):
    """Undo what importing lmms-eval does to PIL in the whole process: accept cut-off images."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """An `Accelerator` settles precision for the whole process; the next test may want another."""
    yield
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
    # `TrainingArguments(bf16=True)` of transformers 4.57 leaves it for whoever comes next.
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Fail what takes longer than the budget and is not marked slow."""
    before = sum(os.times()[:4])
    result = yield
    used = sum(os.times()[:4]) - before
    over = BUDGET and used > BUDGET and item.get_closest_marker("slow") is None
    if over and used > BUDGET * slowdown():
        pytest.fail(
            f"{item.name} took {used:.1f} s of processor time, the budget is {BUDGET:g} s: make it "
            "faster, or mark it slow (then it only runs in `make test-all`)",
            pytrace=False,
        )
    return result


def pytest_sessionstart(session):
    """Import what most tests use, so that the first of them does not pay for it.

    Not the package itself: its lines would be read before coverage counts them.
    """
    if session.config.getoption("numprocesses", None):
        return  # the tests run in workers, which start sessions of their own
    import transformers.models.clip.modeling_clip
    import transformers.models.llama.modeling_llama
    import transformers.models.llava.modeling_llava
    import transformers.trainer  # noqa: F401
