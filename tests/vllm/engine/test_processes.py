"""Answers stay the library's where the engine, or each part of the model, has its own process."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm.version", reason="make test-vllm builds an environment with vLLM")

from compared import BY_KEYS, EVERY_ALGORITHM, answers, check_equal, check_varied
from served_models import reference


def test_in_a_process_of_its_own(engine, tiny, requests):
    expected = reference(tiny, requests, BY_KEYS)
    (found,) = engine(tiny, requests, BY_KEYS, several=True)
    check_varied(expected)
    assert answers(found) == expected


def test_tensor_parallel(engine, tiny, requests):
    """Without the all-reduce of the mean keys all answers about images change."""
    passes, features = engine(
        tiny,
        requests,
        BY_KEYS,
        features=EVERY_ALGORITHM,
        several=True,
        # Functions are sent to the processes, which vLLM does for tests only.
        env={"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"},
        tensor_parallel_size=2,
    )
    check_equal(passes, features, tiny, reference(tiny, requests, BY_KEYS))
