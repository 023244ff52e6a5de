"""Reads lmms-eval's logged samples: questions, images, scores and token counts.

Tasks differ in what they call things and in the form of their scores. Needs neither models nor
lmms-eval's code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..measure.evaluate.records import Question

# What a task's documents call the image and the type of a question. A question number counts as
# an image: MME asks twice under the same one.
_IMAGE = ("scene_id", "image_id", "imageId", "image_source", "data_id", "question_id")
_GROUP = ("question_type", "category", "kind")


def task_metrics(results: Mapping[str, Any]) -> dict[str, float]:
    """A task's own numbers by metric, standard errors and texts left out."""
    found = {}
    for name, value in results.items():
        metric = name.split(",")[0]
        if metric.endswith(("_stderr", "_stderr_clt")) or metric in ("alias", "submission"):
            continue
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            found[metric] = float(value)
    return found


def questions(samples: Sequence[Mapping[str, Any]]) -> list[Question]:
    """What was asked, with the image and the type of every question where they are known."""
    docs = [sample.get("doc") or {} for sample in samples]
    image = next((f for f in _IMAGE if all(f in doc for doc in docs)), None)
    group = next((f for f in _GROUP if all(f in doc for doc in docs)), None)
    return [
        Question(
            doc_id=int(sample["doc_id"]),
            cluster=str(doc[image] if image else sample["doc_id"]),
            group=str(doc[group]) if group else "",
            target=answer_text(sample["target"]),
            doc_hash=str(sample["doc_hash"])[:16],
        )
        for sample, doc in zip(samples, docs, strict=True)
    ]


def question_scores(
    samples: Sequence[Mapping[str, Any]], metrics: Sequence[str]
) -> list[float] | None:
    """One number per question, None for a task that only scores the whole."""
    scores = []
    for sample in samples:
        values = (question_score(sample[name]) for name in metrics if name in sample)
        score = next((value for value in values if value is not None), None)
        if score is None:
            return None
        scores.append(score)
    return scores


def question_score(value: Any) -> float | None:
    """The score in what a task says about one question, None where there is none.

    Numbers are scores. Tasks that aggregate by themselves (MME, POPE, SEED, MMBench) hand over a
    mapping with a score, or with prediction and answer.
    """
    if isinstance(value, (bool, int, float)):
        return float(value)
    if not isinstance(value, Mapping):
        return None
    if isinstance(value.get("score"), (bool, int, float)):
        return float(value["score"])
    given, answer = value.get("pred", value.get("prediction")), value.get("answer")
    if not isinstance(given, str) or not isinstance(answer, str):
        return None
    given, answer = given.strip().lower(), answer.strip().lower()
    # "B. a cat" and "B" both choose B.
    letter = len(answer) == 1 and given[:1] == answer and not given[1:2].isalnum()
    return float(letter or given == answer)


def input_tokens(samples: Sequence[Mapping[str, Any]]) -> list[int]:
    """Tokens of every prompt as the language model saw it, where the model counts them."""
    counts = [count for sample in samples for count in sample.get("token_counts") or [] if count]
    return [count["input_tokens"] for count in counts if count.get("input_tokens") is not None]


def answer_text(value: Any) -> str:
    """An answer or target as text, without the lists around it."""
    while isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    return value if isinstance(value, str) else str(value)
