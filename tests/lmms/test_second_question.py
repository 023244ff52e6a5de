"""The tasks of second questions: pairs, turns, and a run of the demo's."""

from __future__ import annotations

import pytest
from PIL import Image

from pitome_vlm.lmms.tasks import second_question

GQA = [
    {"imageId": "a", "question": "Is the bird on the left side?", "answer": "no"},
    {"imageId": "a", "question": "What is the bird standing on?", "answer": "fence"},
    {"imageId": "a", "question": "Who is wearing a helmet?", "answer": "man"},
    {"imageId": "b", "question": "Is it an airplane?", "answer": "yes"},
]


def test_two_questions_about_other_parts_share_no_telling_word():
    parts = second_question.parts_of(GQA)
    assert parts[1] == {"what", "bird", "standing", "fence"}
    pairs = second_question.paired([row["imageId"] for row in GQA], parts)
    assert pairs == [(0, 2), (1, 2), (2, 0)]
    # What most questions say tells nothing.
    many = second_question.parts_of(GQA * 30)
    assert all("bird" not in part for part in many)


def test_gqa_gets_images_after_its_pairs(monkeypatch):
    import datasets
    from lmms_eval.tasks.gqa import utils

    image = Image.new("L", (4, 4))
    monkeypatch.setattr(
        utils, "gqa_process_docs", lambda rows: [{**row, "image": image} for row in rows]
    )
    docs = second_question.gqa_docs(datasets.Dataset.from_list(GQA))
    assert [doc["first_question"] for doc in docs] == [
        GQA[2]["question"],
        GQA[2]["question"],
        GQA[0]["question"],
    ]
    turns = second_question.gqa_messages(docs[1], {"post_prompt": " In a word."})
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user"]
    picked = [[part.get("text") for part in turn["content"]] for turn in turns]
    assert picked == [
        [None, "Who is wearing a helmet? In a word."],
        ["man"],
        ["What is the bird standing on? In a word."],
    ]
    assert turns[0]["content"][0]["url"].mode == "RGB"


@pytest.mark.slow
def test_the_demo_answers_second_questions(tmp_path):
    from pitome_vlm.lmms.evaluation import Evaluator
    from pitome_vlm.measure.evaluate import suites

    evaluator = Evaluator("demo", tmp_path, batch_size=8, limit=8)
    evaluator.check_tasks(["demo_second", "gqa_second"])
    cell = suites.Cell("demo_second", suites.method_setting("pitome_plus", 36))
    evaluator.load([cell.setting])
    measured = evaluator(cell)
    assert len(measured.scores) == 8
    assert sum(measured.scores) >= 6
    # An image, two questions and an answer.
    assert measured.facts["mean_input_tokens"] > 36 + 14
