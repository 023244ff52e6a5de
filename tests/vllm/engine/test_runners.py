"""Answers stay the library's where layers are compiled, and in vLLM's other model runner."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm.version", reason="make test-vllm builds an environment with vLLM")

from compared import answers, check_varied
from served_models import reference, save_under_names

from pitome_vlm import MergeConfig

# Compilers take their time on a busy machine.
pytestmark = pytest.mark.timeout(900)
CONFIG = MergeConfig(keep=0.25)
CHUNKS = {"block_size": 32, "max_num_batched_tokens": 40}


def test_compiled(engine, tiny_qwen, requests):
    passes = engine(tiny_qwen, requests, CONFIG, passes=2, enforce_eager=False, **CHUNKS)
    expected = reference(tiny_qwen, requests, CONFIG)
    check_varied(expected)
    assert [answers(one) for one in passes] == [expected] * 2


def test_second_model_runner(engine, tiny, requests, tmp_path):
    """From weights that are called as in published checkpoints."""
    config = MergeConfig(tokens=30, positions="median")
    path = save_under_names(tiny, tmp_path / "published", "published")
    passes = engine(path, requests, config, passes=2, second_runner=True, **CHUNKS)
    expected = reference(tiny, requests, config)
    check_varied(expected)
    assert [answers(one) for one in passes] == [expected] * 2


def test_compiled_in_half_precision(engine, demo, questions):
    """Which tokens merge is a choice that rounding may change, so not all answers have to agree."""
    (found,) = engine(demo, questions, CONFIG, tokens=1, dtype="bfloat16", enforce_eager=False)
    expected = reference(demo, questions, CONFIG, tokens=1)
    same = [ours == theirs for ours, theirs in zip(answers(found), expected, strict=True)]
    assert sum(same) >= 0.95 * len(same)
