"""Answers stay the library's where the engine, or each part of the model, has its own process."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm.version", reason="make test-vllm builds an environment with vLLM")

from compared import BY_KEYS, EVERY_ALGORITHM, answers, check_equal, check_varied
from served_models import reference, save_adapter, save_under_names

from pitome_vlm import MergeConfig


def test_in_a_process_of_its_own_with_all_that_disturbs(engine, tiny, requests, tmp_path):
    """Preempted requests, guessed tokens, an adapter, and weights under names of their own.

    Requests with and without an adapter do not come together: vLLM on a CPU answers some of those
    without one wrongly then, also where nothing is merged.
    """
    adapter = save_adapter(tiny, tmp_path / "adapter")
    config = MergeConfig(keep=0.25)
    path = save_under_names(tiny, tmp_path / "renamed", "modules of transformers 5")
    drafts = {"method": "ngram", "num_speculative_tokens": 2}
    drafts |= {"prompt_lookup_max": 2, "prompt_lookup_min": 1}
    passes = engine(
        path,
        requests,
        config,
        adapters=[adapter],
        several=True,
        preempted=True,
        max_model_len=160,
        block_size=32,
        num_gpu_blocks_override=6,
        disable_log_stats=False,
        speculative_config=drafts,
        enable_lora=True,
        max_lora_rank=8,
    )
    plain = reference(tiny, requests, config)
    adapted = reference(tiny, requests, config, adapter=adapter)
    check_varied(plain)
    assert plain != adapted
    assert [answers(one) for one in passes] == [plain, adapted]


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
