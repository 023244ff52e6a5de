"""Parts of the plugin that need vLLM's modules, but no engine."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm.version", reason="make test-vllm builds an environment with vLLM")

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope

from pitome_vlm.vllm import startup
from pitome_vlm.vllm.calibration import Calibration
from pitome_vlm.vllm.rotary import StepTable

HEAD, MOST = 32, 512
ROPES = (
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": MOST // 4},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": MOST // 8,
    },
)


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
def test_places_between_positions_are_those_of_transformers(rope):
    rope = {**rope, "rope_theta": 1e4}
    config = LlamaConfig(
        hidden_size=4 * HEAD,
        num_attention_heads=4,
        max_position_embeddings=MOST,
        rope_parameters=rope,
    )
    # The last one lies past every table.
    places = torch.tensor([0.0, 1.0, 17.25, 100.5, 333.1, MOST - 1, 3 * MOST + 0.5])
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), places[None])
    with set_current_vllm_config(VllmConfig()):
        rotary = get_rope(HEAD, MOST, True, config.rope_parameters, torch.float32)
        table = StepTable(rotary, len(places))
    table(places[None])
    expected = torch.cat([cos[0, :, : HEAD // 2], sin[0, :, : HEAD // 2]], -1)
    torch.testing.assert_close(table.table, expected, atol=3e-4, rtol=0)


def test_whole_positions_are_vllm_s_own_to_the_last_bit():
    with set_current_vllm_config(VllmConfig()):
        rotary = get_rope(
            HEAD, MOST, True, {"rope_type": "default", "rope_theta": 1e4}, torch.float32
        )
        table = StepTable(rotary, MOST)
    table(torch.arange(MOST).float()[None])
    assert torch.equal(table.table, rotary.cos_sin_cache)


def test_rotary_embeddings_of_another_kind_are_refused():
    with pytest.raises(ValueError, match="SimpleNamespace has no places between two positions"):
        StepTable(SimpleNamespace(), 4)


class Backend:
    """An attention backend that takes some sizes of heads."""

    def __init__(self, name, *sizes):
        self.name, self.sizes = name, sizes

    def get_name(self):
        return self.name

    def supports_head_size(self, size):
        return size in self.sizes


def choose(monkeypatch, chosen, head, backends):
    """The width of heads on a platform with some backends, of which one may be asked for."""
    asked = []

    @contextlib.contextmanager
    def current(config):
        asked.append(config.attention_config.backend)
        yield

    def select(size, dtype, cache_dtype, use_mm_prefix):
        for backend in backends:
            if asked[-1] in (None, backend) and backend.supports_head_size(size):
                return backend
        raise ValueError("no valid backend")

    monkeypatch.setattr(startup, "get_attn_backend", select)
    monkeypatch.setattr(startup, "set_current_vllm_config", current)
    arch = SimpleNamespace(head_size=head)
    model = SimpleNamespace(
        model_arch_config=arch,
        get_head_size=lambda: head,
        dtype=torch.bfloat16,
        is_mm_prefix_lm=False,
    )
    startup.widen(
        SimpleNamespace(
            model_config=model,
            attention_config=SimpleNamespace(backend=chosen),
            cache_config=SimpleNamespace(cache_dtype="auto"),
        )
    )
    return arch.head_size


FLASH = Backend("FLASH_ATTN", *range(8, 257, 8))
LISTED = Backend("LISTED", 64, 128, 256)


@pytest.mark.parametrize(
    ("chosen", "head", "wide"),
    [(None, 128, 136), (None, 80, 88), (FLASH, 64, 72), (LISTED, 64, 128), (LISTED, 128, 256)],
)
def test_heads_become_as_wide_as_the_backend_needs(monkeypatch, caplog, chosen, head, wide):
    caplog.set_level("INFO", startup.logger.name)
    assert choose(monkeypatch, chosen, head, [FLASH, LISTED]) == wide
    # What it costs is printed.
    cost = f"{100 * (wide - head) / head:.0f} % more memory per token"
    assert f"heads of {head} channels become {wide} in the KV cache" in caplog.text
    assert cost in caplog.text


def test_a_backend_that_takes_no_wider_head_is_named_with_one_that_does(monkeypatch):
    narrow = Backend("NARROW", 64, 128)
    message = r"NARROW takes no head of 136 channels.*--attention-backend FLASH_ATTN takes 136"
    with pytest.raises(ValueError, match=message):
        choose(monkeypatch, narrow, 128, [narrow, FLASH])
    with pytest.raises(ValueError, match=r"takes no head of 264 .*serve with size_bias=false"):
        choose(monkeypatch, None, 256, [FLASH])


def test_embeddings_that_a_client_sends_are_words():
    """They come without channels, next to images that have them."""
    told = SimpleNamespace(numbers=torch.ones(8, 2), width=4)
    numbers = torch.tensor([[1.5, 0.7], [3.0, 1.1]])
    image, words = torch.randn(2, 4), torch.randn(3, 4)
    visual = torch.tensor([True, True, False, True, True, True, False])
    found = Calibration.cut(told, 7, [torch.cat([image, numbers], 1), words], visual)
    assert torch.equal(torch.cat(found), torch.cat([image, words]))
    expected = torch.zeros(7, 2)
    expected[:2] = numbers
    assert torch.equal(told.numbers[:7], expected)
