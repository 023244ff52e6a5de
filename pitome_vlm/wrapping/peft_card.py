"""The model card of an adapter: what a reader has to know before using it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ..common import __version__, markdown_table, write_text
from ..merge.config import CONFIG_NAME, MergeConfig
from ..merge.schedule import Schedule
from .card import TAGS, shown_base, with_section
from .peft_record import PeftRecord


def update_card(path: Path, previous: str | None, section: str, base: str | None) -> None:
    """Put the section into the card that PEFT has just written or brought up to date.

    Args:
        path: the README.md.
        previous: its text before PEFT touched it, None where there was none. What people wrote
            stays; only the part between our own marks is replaced.
        section: see `card_section`.
        base: folder or hub name of the base model.
    """
    card = ModelCard.load(path)
    card.data["tags"] = sorted({*(card.data.get("tags") or ()), *TAGS})
    card.data["pipeline_tag"] = "image-text-to-text"
    if previous is None:
        # PEFT's own template is a page of "More Information Needed".
        previous = f"\n# Adapter for {shown_base(base)} with merged visual tokens\n"
    card.text = with_section(previous, section)
    write_text(path, str(card))


def card_section(record: PeftRecord, config: MergeConfig, schedule: Schedule) -> str:
    """Budget, algorithm, base, data, accuracy before and after, and how to load it."""
    training = record.training or {}
    lines = [
        f"Trained with [PiToMe](https://arxiv.org/abs/2405.16148) token merging on (pitome-vlm "
        f"{__version__}): {schedule.counts_out} of {schedule.tokens_in} visual tokens per image "
        "reach the language model.",
        "",
        "```python",
        "import pitome_vlm",
        'model, processor = pitome_vlm.load("this/adapter")',
        "```",
        "",
        f"restores base model, quantisation, adapter and merging (`{CONFIG_NAME}`).",
        "",
        markdown_table(("", ""), _facts(record, config, schedule, training)),
    ]
    return "\n".join([*lines, *_accuracy(training), *_notes(training)])


def _facts(
    record: PeftRecord, config: MergeConfig, schedule: Schedule, training: dict[str, Any]
) -> list[tuple[str, str]]:
    quantization = record.quantization or {}
    kind = "none"
    if quantization.get("load_in_4bit"):
        kind = f"4 bits ({quantization.get('bnb_4bit_quant_type')})"
    elif quantization.get("load_in_8bit"):
        kind = "8 bits (LLM.int8)"
    options = {k: v for k, v in config.changed().items() if k not in ("keep", "tokens", "ratio")}
    facts = [
        ("base model", f"`{shown_base(record.base_model)}`"),
        ("base revision", record.base_revision or ""),
        ("visual tokens", f"{schedule.tokens_in} -> {schedule.counts_out} per image"),
        ("budget", _budget(config)),
        ("algorithm", config.algorithm),
        ("options", ", ".join(f"{k}={v}" for k, v in options.items() if k != "algorithm")),
        ("budgets in training", ", ".join(map(str, training.get("budgets") or ()))),
        ("quantisation", f"{kind}, other weights {record.base_dtype}"),
        ("training data", str(training.get("data", ""))),
        ("LoRA", str(training.get("lora", ""))),
        ("training", str(training.get("recipe", ""))),
    ]
    return [(name, value) for name, value in facts if value]


def _accuracy(training: dict[str, Any]) -> list[str]:
    before, after = training.get("before"), training.get("after")
    if not before or not after:
        return []
    rows = [
        ("answers right %", "answer_accuracy", 100.0),
        ("answer tokens right %", "token_accuracy", 100.0),
        ("loss", "loss", 1.0),
    ]
    table = [
        (title, f"{scale * before[name]:.4g}", f"{scale * after[name]:.4g}")
        for title, name, scale in rows
        if name in before and name in after
    ]
    return [
        "",
        f"Accuracy on {after.get('answers', 0)} validation answers "
        f"({training.get('validation') or 'unnamed'}) at this budget, before (merged, untrained) "
        "and after:",
        "",
        markdown_table(("", "before", "after"), table),
        "",
        "An answer is right when the most likely token at each of its places, its end included, "
        "is the reference's (greedy decoding would write exactly the reference).",
    ]


def _notes(training: dict[str, Any]) -> list[str]:
    versions = training.get("versions")
    return ["", f"Versions: {json.dumps(versions)}"] if versions else []


def _budget(config: MergeConfig) -> str:
    words = ((word, getattr(config, word)) for word in ("keep", "tokens", "ratio"))
    return ", ".join(f"{word}={value}" for word, value in words if value is not None)
