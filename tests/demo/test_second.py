"""Second questions: which ones, their prompts, and the page about them."""

import argparse
import json

import numpy as np
import pytest

import pitome_vlm
from pitome_vlm.demo import load_split
from pitome_vlm.demo.dataset import Sample
from pitome_vlm.demo.second import SecondQuestion, second_questions
from pitome_vlm.measure.demo_benchmark import prompt_of
from scripts.demo import second
from scripts.demo.stored import CHANGES


def test_a_second_question_is_about_another_part_of_the_same_image():
    asked = [
        Sample(0, "tiny", "count", "How many objects are there?", "three"),
        Sample(0, "tiny", "where", "Where is the red star?", "top-left"),
        Sample(0, "tiny", "exists", "Are there more stars than rings?", "yes"),
        Sample(0, "tiny", "shape", "What shape is the large object?", "ring"),
        Sample(1, "tiny", "colour", "What colour is the cross?", "blue"),
    ]
    found = second_questions(asked)
    assert [(one.question_type, one.first_question) for one in found] == [
        ("where", "What shape is the large object?"),
        ("shape", "Where is the red star?"),
    ]
    assert found[0].first_answer == "ring"
    samples = load_split("val", 60)
    seconds = second_questions(samples)
    assert 30 < len(seconds) < 60
    by_text = {(one.scene_id, one.question): one for one in samples}
    for one in seconds:
        first = by_text[one.scene_id, one.first_question]
        assert first.answer == one.first_answer
        assert first.question != one.question
        assert by_text[one.scene_id, one.question].answer == one.answer


def test_the_first_question_and_its_answer_stay_in_the_prompt():
    _, processor = pitome_vlm.load("demo", dtype="float32")
    one = SecondQuestion(0, "tiny", "shape", "What shape is it?", "ring", "Where is it?", "left")
    text = prompt_of(processor, one)
    places = [text.index(part) for part in ("<image>", "Where is it?", "left", "What shape is it?")]
    assert places == sorted(places)
    assert text.count("<image>") == 1
    assert "ring" not in text


@pytest.fixture
def results():
    """As after a run in which compact positions lose every other question at 9 tokens."""
    samples = load_split("val", 60)
    right = np.ones(len(second_questions(samples)), int)
    cells = {}
    for key, setting in second.settings().items():
        some = "size bias alone" in key and key.endswith("/9")
        bits = right * (np.arange(len(right)) % 2) if some else right
        config, stored = setting.config.to_dict(), "".join(map(str, bits))
        cells[key] = {"config": config, "changes": len(CHANGES), "tokens": 9, "correct": stored}
    facts = {"split": "val", "limit": 60, "checkpoint": "sha256:1", "questions": len(right)}
    return {"provenance": facts, "later": [], "cells": cells}


def test_the_page_compares_with_the_same_questions_asked_alone(results):
    text = second.report(results, None)
    assert "## The same questions asked alone" not in text
    (line,) = [one for one in text.splitlines() if one.startswith("| compact")]
    assert "-51.0 (" in line.split("|")[-2]
    assert "hold together" in text
    everything = {"correct": "1" * 60}
    alone = {"cells": {key: cell | everything for key, cell in results["cells"].items()}}
    text = second.report(results, alone)
    compact = [one for one in text.splitlines() if one.startswith("| compact")]
    assert ["-51.0" in one for one in compact] == [True, False, True]
    assert "the 16 of them" in text


def test_a_run_goes_on_only_with_the_same_model_and_questions(results, tmp_path):
    stored = tmp_path / "second_val.json"
    stored.write_text(json.dumps(results))
    wanted = argparse.Namespace(
        split="val", limit=48, batch_size=4, jobs=1, model_name=None, model=second.checkpoint_path()
    )
    with pytest.raises(SystemExit, match="was made with limit 60, not 48"):
        second.measure(wanted, stored)
    wanted.limit = 60
    with pytest.raises(SystemExit, match="was made with checkpoint sha256:1, not"):
        second.measure(wanted, stored)


@pytest.mark.slow
def test_the_command_asks_all_settings_and_resumes(tmp_path, monkeypatch):
    words = ["second", "--output", str(tmp_path), "--limit", "12", "--jobs", "1"]
    monkeypatch.setattr("sys.argv", words)
    second.main()
    stored = tmp_path / "second_val.json"
    first = json.loads(stored.read_text())
    assert first["cells"].keys() == second.settings().keys()
    second.main()
    assert json.loads(stored.read_text())["cells"] == first["cells"]
