"""Merging against smaller images, from the folders of two sweeps."""

from __future__ import annotations

import dataclasses

import pytest
import sweep_stand_in as stand_in

from pitome_vlm.measure.evaluate import suites
from pitome_vlm.measure.evaluate.records import Folder
from scripts.hard_questions import table

SETTING = suites.method_setting("pitome", 64)


def scored(right):
    """The stand-in's sweep with scores by `right(cell, question)`."""

    def evaluate(cell):
        measured = stand_in.measure(cell)
        scores = [float(right(cell, number)) for number in range(stand_in.QUESTIONS)]
        return dataclasses.replace(measured, scores=scores)

    return evaluate


def test_hard_are_those_that_only_smaller_images_get_wrong(tmp_path):
    # Unreduced all but the first 10 are right; smaller images lose every third question, merging
    # every sixth and the first ones.
    def merged(cell, number):
        return number >= 10 and (cell.setting.budget == "" or number % 6 > 0)

    stand_in.sweep(tmp_path / "merged", resume=False, evaluate=scored(merged))
    smaller = scored(lambda cell, number: number % 3 > 0)
    stand_in.sweep(tmp_path / "smaller", resume=False, evaluate=smaller)
    folders = Folder(tmp_path / "merged"), Folder(tmp_path / "smaller")
    text = table([*stand_in.TASKS, "not measured"], SETTING, *folders)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert [line[0] for line in lines[2:]] == list(stand_in.TASKS)
    hard = [number for number in range(10, 60) if number % 3 == 0]
    kept = sum(number % 6 > 0 for number in hard)
    assert lines[2][1:4] == ["83.3", "66.7", "70.0"]
    assert lines[2][4].startswith("+3.3 (-")
    assert lines[2][5:] == [str(len(hard)), f"{100 * kept / len(hard):.1f}"]


def test_sweeps_of_different_questions_are_refused(tmp_path):
    def elsewhere(cell):
        measured = stand_in.measure(cell)
        asked = [dataclasses.replace(one, cluster="one") for one in measured.questions]
        return dataclasses.replace(measured, questions=asked)

    stand_in.sweep(tmp_path / "merged", resume=False)
    stand_in.sweep(tmp_path / "smaller", resume=False, evaluate=elsewhere)
    with pytest.raises(ValueError, match="gqa: the two sweeps asked different questions"):
        table(["gqa"], SETTING, Folder(tmp_path / "merged"), Folder(tmp_path / "smaller"))
