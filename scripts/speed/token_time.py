"""Host time that wrapping adds to one decoded token: a small model, where the host is all there is.

    python -m scripts.speed.token_time
    python -m scripts.speed.token_time --rounds 20 --tokens 300 --threads 1

A LLaVA of random weights whose language model has 4 layers of 64 channels generates, unwrapped and
wrapped in turns. A token's time is processor time of a long answer less that of a short one, over
the tokens between them; the least of the rounds, because others on the machine only add to it. The
exit code is 1 where wrapping adds more than --limit milliseconds in one of the rows.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import pitome_vlm
from pitome_vlm.common import markdown_table
from pitome_vlm.measure.provenance import in_words, machine, versions

IMAGE = 199
# Tokens of the short answer, which both pay for: encoding, prefill, warm caches.
SHORT = 20
WAYS: dict[str, dict[str, Any]] = {
    "keep=0.25": {"keep": 0.25},
    "keep=0.25, nothing told to the language model": {
        "keep": 0.25,
        "size_bias": False,
        "positions": "compact",
    },
}


def small_model() -> Any:
    """A LLaVA of 4 language layers, random weights."""
    tower = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=64,
        num_attention_heads=2,
        num_hidden_layers=2,
        image_size=96,
        patch_size=8,
    )
    words = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        vocab_size=200,
    )
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=tower, text_config=words, image_token_index=IMAGE)
    return LlavaForConditionalGeneration._from_config(config).eval()


@torch.no_grad()
def token_ms(model: Any, tokens: int) -> float:
    """Milliseconds of processor time per token of a long answer, its first ones left out."""
    ids = torch.full((1, 20 + 144), 5)
    ids[:, 5 : 5 + 144] = IMAGE
    asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    asked["pixel_values"] = torch.zeros(1, 3, 96, 96)
    spent = []
    for length in (SHORT, SHORT + tokens):
        # Greedy: 0 never ends an answer, because exactly `length` tokens are asked for.
        config = GenerationConfig(
            max_new_tokens=length, min_new_tokens=length, do_sample=False, pad_token_id=0
        )
        start = time.process_time()
        model.generate(**asked, generation_config=config)
        spent.append(time.process_time() - start)
    return (spent[1] - spent[0]) / tokens * 1e3


def added(model: Any, tokens: int, rounds: int) -> tuple[float, dict[str, float]]:
    """A token of the unwrapped model, and what each way of wrapping adds to it, in ms."""
    token_ms(model, 5)
    plain: list[float] = []
    wrapped: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(rounds):
        plain.append(token_ms(model, tokens))
        for name, options in WAYS.items():
            with pitome_vlm.wrapped(model, **options):
                wrapped[name].append(token_ms(model, tokens))
    return min(plain), {name: min(own) - min(plain) for name, own in wrapped.items()}


def main() -> int:
    """Measure and print; 1 where wrapping adds more than the limit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=200, help="of the longer answer")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=float, default=0.3, help="milliseconds")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    plain, more = added(small_model(), options.tokens, options.rounds)
    rows = [["unwrapped", f"{plain:.3f}", ""]]
    rows += [[name, f"{plain + ms:.3f}", f"{ms:+.3f}"] for name, ms in more.items()]
    print(in_words(machine("cpu") | versions()), "", sep="\n")
    print(markdown_table(["", "ms per token", "added"], rows))
    return int(max(more.values()) > options.limit)


if __name__ == "__main__":
    raise SystemExit(main())
