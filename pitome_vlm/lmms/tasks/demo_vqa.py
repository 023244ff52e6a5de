"""The functions of `demo_vqa.yaml`: images, questions and scores of the bundled model.

Images are not stored: they are drawn from the number of their scene, the same pixels that
`pitome_vlm.measure.demo_benchmark` asks about.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from pitome_vlm.demo.dataset import Sample, load_split, scene_image
from pitome_vlm.loading.records import parse_records

SPLIT = "test"
DATA = Path(__file__).with_suffix(".jsonl")


def records(samples: Sequence[Sample] | None = None) -> list[dict[str, Any]]:
    """The rows of `demo_vqa.jsonl`, one per held-out question, in the library's order.

    Args:
        samples: the questions; None for all of the test split.
    """
    samples = load_split(SPLIT) if samples is None else samples
    return [
        {
            "id": f"{SPLIT}-{number:04d}",
            "scene_id": sample.scene_id,
            "kind": sample.kind,
            "question_type": sample.question_type,
            "question": sample.question,
            "answer": sample.answer,
        }
        for number, sample in enumerate(samples)
    ]


def write_data() -> None:
    """Write `demo_vqa.jsonl` anew, for when the questions of the split have changed."""
    DATA.write_text("".join(f"{json.dumps(row)}\n" for row in records()), encoding="utf-8")


def doc_to_visual(doc: Mapping[str, Any]) -> list[Image.Image]:
    """The image of a question, as a list."""
    return [_scene_image(int(doc["scene_id"]))]


def doc_to_text(
    doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, str] | None = None
) -> str:
    """The question, within what `lmms_eval_specific_kwargs` puts around it."""
    around = lmms_eval_specific_kwargs or {}
    return f"{around.get('pre_prompt', '')}{doc['question']}{around.get('post_prompt', '')}"


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """1 or 0 for the answer, once for all questions and once for those of the same type."""
    right = float(results[0].strip().lower() == doc["answer"].strip().lower())
    return {"exact_match": right, f"exact_match_{doc['question_type']}": right}


def doc_to_choice(doc: Mapping[str, Any]) -> list[str]:
    """Every answer that a question of this type has anywhere in the split."""
    return list(_answers()[doc["question_type"]])


def doc_to_choice_index(doc: Mapping[str, Any]) -> int:
    """Which of the choices is right."""
    return doc_to_choice(doc).index(doc["answer"])


@functools.lru_cache(maxsize=512)
def _scene_image(scene_id: int) -> Image.Image:
    """Drawn once per scene: drawing takes as long as answering, and a scene has six questions."""
    return scene_image(scene_id, SPLIT)


@functools.cache
def _answers() -> dict[str, tuple[str, ...]]:
    rows = [record for _, record in parse_records(DATA.read_bytes(), DATA.name)]
    kinds = sorted({row["question_type"] for row in rows})
    return {
        kind: tuple(sorted({row["answer"] for row in rows if row["question_type"] == kind}))
        for kind in kinds
    }
