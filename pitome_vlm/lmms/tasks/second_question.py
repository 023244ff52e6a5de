"""The functions of the tasks that ask a second question about another part of the same image.

The first question and its right answer stay in the prompt, so that all methods see the same turns.
What merging loses of the parts that the first question was not about shows in the second.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pitome_vlm.demo.dataset import Sample
from pitome_vlm.demo.second import second_questions
from pitome_vlm.lmms.tasks import demo_vqa

# Shorter words, and those of more than this share of all questions, do not tell what one is about.
_SHORTEST = 4
_COMMON = 1 / 20
_FEW = 20


def parts_of(rows: Sequence[Mapping[str, Any]]) -> list[set[str]]:
    """What every question is about: its telling words and those of its answer, in lower case.

    Args:
        rows: with "question" and "answer".
    """
    words = [
        {
            word
            for word in re.findall(r"[a-z]+", f"{row['question']} {row['answer']}".lower())
            if len(word) >= _SHORTEST
        }
        for row in rows
    ]
    counts = Counter(word for own in words for word in own)
    most = max(_FEW, _COMMON * len(rows))
    return [{word for word in own if counts[word] <= most} for own in words]


def paired(images: Sequence[Any], parts: Sequence[set[str]]) -> list[tuple[int, int]]:
    """Numbers of every second question and of the first one before it.

    Args:
        images: [questions] the image of every question.
        parts: [questions] what it is about; two about another part share nothing.

    Returns:
        Of every question that has a first one: (its number, the first one's), in order.
    """
    asked: dict[Any, list[int]] = {}
    for number, image in enumerate(images):
        asked.setdefault(image, []).append(number)
    found = []
    for number, image in enumerate(images):
        others = (
            one for one in asked[image] if parts[one] and parts[one].isdisjoint(parts[number])
        )
        first = next(others, None)
        if parts[number] and first is not None:
            found.append((number, first))
    return found


def demo_docs(dataset: Any) -> Any:
    """The demo's questions that have a first one, with it in columns of their own."""
    rows = list(dataset)
    names = ("scene_id", "kind", "question_type", "question", "answer")
    samples = [Sample(**{name: row[name] for name in names}) for row in rows]
    places = {(one.scene_id, one.question): place for place, one in enumerate(samples)}
    pairs = [
        (places[one.scene_id, one.question], places[one.scene_id, one.first_question])
        for one in second_questions(samples)
    ]
    return _with_first(dataset, rows, pairs)


def gqa_docs(dataset: Any) -> Any:
    """GQA's questions that have a first one, with it in columns of their own, and the images."""
    from lmms_eval.tasks.gqa.utils import gqa_process_docs

    rows = list(dataset.select_columns(["imageId", "question", "answer"]))
    pairs = paired([row["imageId"] for row in rows], parts_of(rows))
    return gqa_process_docs(_with_first(dataset, rows, pairs))


def _with_first(
    dataset: Any, rows: Sequence[Mapping[str, Any]], pairs: Sequence[tuple[int, int]]
) -> Any:
    chosen = dataset.select([second for second, _ in pairs])
    for name in ("question", "answer"):
        chosen = chosen.add_column(f"first_{name}", [rows[first][name] for _, first in pairs])
    return chosen


def demo_messages(
    doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """The three turns of a demo question."""
    return _turns(doc, demo_vqa.doc_to_visual(doc)[0], lmms_eval_specific_kwargs)


def gqa_messages(
    doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """The three turns of a GQA question."""
    return _turns(doc, doc["image"].convert("RGB"), lmms_eval_specific_kwargs)


def _turns(
    doc: Mapping[str, Any], image: Any, around: Mapping[str, str] | None
) -> list[dict[str, Any]]:
    before, after = ((around or {}).get(name, "") for name in ("pre_prompt", "post_prompt"))

    def said(role: str, text: str) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": text}]}

    first = said("user", f"{before}{doc['first_question']}{after}")
    first["content"].insert(0, {"type": "image", "url": image})
    second = said("user", f"{before}{doc['question']}{after}")
    return [first, said("assistant", doc["first_answer"]), second]
