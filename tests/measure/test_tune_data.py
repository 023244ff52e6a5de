"""`tune`: questions and answers, recipes, budgets and options, and what is refused of them."""

from __future__ import annotations

import dataclasses
import io
import re

import pytest
from hypothesis import find, given, settings
from hypothesis import strategies as st
from tuning import write_jsonl

from pitome_vlm.measure.tune import (
    Plan,
    Recipe,
    Row,
    default_recipes,
    exact_match,
    normalise,
    read_rows,
)
from pitome_vlm.measure.tune.recipes import BASELINES, token_counts
from pitome_vlm.merge import algorithms, registry
from pitome_vlm.merge.config import MergeConfig

# --- recipes, budgets, options


def test_default_recipes_follow_the_registry(monkeypatch):
    recipes = default_recipes()
    tried = [recipe.config(9).algorithm for recipe in recipes]
    assert recipes[0].config(9) == MergeConfig(tokens=9, algorithm=MergeConfig(keep=1.0).algorithm)
    assert set(tried) == set(algorithms.available()) - set(BASELINES)
    assert len({recipe.config(9) for recipe in recipes}) == len(recipes)
    assert len({recipe.name for recipe in recipes}) == len(recipes)
    mine = dataclasses.replace(algorithms.get("tome"), name="mine")
    monkeypatch.setitem(registry._known, "mine", mine)
    assert "mine" in [recipe.name for recipe in default_recipes()]


def test_budgets_are_counts_or_fractions():
    assert token_counts(144, [0.25, 36, 72, 1.0, 144]) == [72, 36]
    assert token_counts(576) == [432, 288, 202, 144, 104, 72, 52, 36]
    for wrong in ([0], [145], [1.5], [-0.1]):
        with pytest.raises(ValueError, match=r"token counts in 1..144 or fractions"):
            token_counts(144, wrong)
    with pytest.raises(ValueError, match="a token count below 144"):
        token_counts(144, [1.0])
    with pytest.raises(TypeError, match="must be numbers"):
        token_counts(144, ["36"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_loss": 1}, r"max_loss must be in \[0, 1\)"),
        ({"max_loss": -0.1}, r"max_loss must be in \[0, 1\)"),
        ({"max_loss": float("nan")}, r"max_loss must be in \[0, 1\)"),
        ({"confidence": 0.2}, "confidence must be in"),
        ({"max_checks": 4}, "max_checks must be at most 3, got 4"),
        ({"recipes": []}, "at least one recipe"),
        ({"recipes": [Recipe("x", {"algorithm": "pitmoe"})]}, "recipe 'x'.*Did you mean 'pitome'"),
        ({"recipes": [Recipe("x", {"alhpa": 1})]}, "recipe 'x'.*Did you mean 'alpha'"),
        ({"recipes": [Recipe("x"), Recipe("x")]}, "given twice"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Plan(**options)


def test_a_recipe_must_leave_the_budget_alone():
    with pytest.raises(ValueError, match=r"leave the budget to the search, got keep=0\.5"):
        Recipe("x", {"keep": 0.5})


# --- answers


@pytest.mark.parametrize(
    ("given", "answers", "right"),
    [
        ("A cat.", ["cat"], True),
        ("the  Cat", ["a dog", "cat"], True),
        ("two", ["2"], True),
        ("top-left", ["top left"], True),
        ("1,000", ["1000"], True),
        ("3.5", ["35"], False),
        ("it's", ["its"], True),
        ("A", ["B"], False),
        ("a.", ["A"], True),
        ("", ["the"], False),
        ("?", ["!"], False),
        ("ÉCOLE", ["école"], True),
    ],
)
def test_answers_are_compared_after_normalisation(given, answers, right):
    assert exact_match(given, answers) == float(right)


@pytest.fixture(scope="module")
def unicode_tables():
    """Hypothesis makes its tables of characters once, which takes seconds."""
    find(st.text(), lambda _: True)


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=20))
def test_normalisation_is_stable_and_never_loses_an_answer(unicode_tables, text):
    once = normalise(text)
    assert normalise(once) == once
    assert bool(once) == bool(text.split())


# --- files


def test_rows_are_read_relative_to_the_file(tmp_path):
    file = write_jsonl(
        tmp_path,
        {"image": "a.png", "question": " what? ", "answer": "cat", "split": "ignored"},
        "",
        {
            "images": [{"bytes": None, "path": "a.png"}, str(tmp_path / "b.png")],
            "question": "which?",
            "answers": ["a", "b"],
        },
    )
    for name in ("a.png", "b.png"):
        (tmp_path / name).touch()
    one, two = read_rows(file)
    assert one.images == (str(tmp_path / "a.png"),)
    assert (one.question, one.answers) == ("what?", ("cat",))
    assert two.images == (str(tmp_path / "a.png"), str(tmp_path / "b.png"))
    assert two.answers == ("a", "b")
    assert two.source == f"{file} line 3"
    assert len(read_rows(file, limit=1)) == 1


def test_a_row_takes_tuples_because_a_text_is_a_sequence_of_letters():
    with pytest.raises(TypeError, match="images must be a tuple, got str 'cat"):
        Row("cat.png", "what?")
    with pytest.raises(TypeError, match="answers must be a tuple, got str 'cat'"):
        Row(("cat.png",), "what?", "cat")
    with pytest.raises(ValueError, match="at least one image"):
        Row((), "what?")
    with pytest.raises(TypeError, match="question must be text, got int 5"):
        Row(("cat.png",), 5)
    with pytest.raises(TypeError, match="answers must be text, got int 5"):
        Row(("cat.png",), "what?", (5,))
    with pytest.raises(TypeError, match="must not be open files"):
        Row((io.BytesIO(b"x"),), "what?")
    with pytest.raises(ValueError, match="row 3: answers holds half of a character"):
        Row(("cat.png",), "what?", ("cat \ud83d",), "row 3")


GOOD = {"image": "a.png", "question": "what?", "answer": "cat"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", "line 2 is not valid JSON"),
        ("[1]", "line 2 must be a JSON object, got list"),
        ({"question": "q"}, "line 2 has no 'image'"),
        ({"image": "a.png"}, "line 2 needs a 'question'"),
        ({"image": "a.png", "question": "  "}, "line 2 needs a 'question'"),
        ({"image": 7, "question": "q"}, "line 2: an image must be a path, bytes or"),
        ({"image": {"bytes": "iVBO"}, "question": "q"}, "line 2: bytes of an image must be bytes"),
        ({"image": {}, "question": "q"}, "line 2: an image as a mapping needs bytes, or a path"),
        ({"image": "gone.png", "question": "q"}, "line 2: no such image file: "),
        ({"image": "iVBORw0KGgo" + "A" * 9000, "question": "q"}, "base64 text where a path"),
        ({"image": "a.png", "question": "\ud83d what?"}, "line 2: 'question' holds half of a"),
        ({**GOOD, "answer": "cat \udc00"}, "line 2: 'answer' holds half of a character"),
        ({"images": [], "question": "q"}, "line 2: 'images' is an empty list"),
        ({"image": "a", "images": ["a"], "question": "q"}, "line 2 must have one of"),
        ({**GOOD, "answer": 3}, "line 2: 'answer' must be a text or a list of texts, got 3"),
        ({**GOOD, "answer": ["a", ""]}, "line 2: 'answer' must be a text"),
    ],
)
def test_a_wrong_line_is_named_by_its_number(tmp_path, line, message):
    (tmp_path / "a.png").touch()
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_rows(write_jsonl(tmp_path, GOOD, line))
    assert len(str(caught.value)) < len(str(tmp_path)) * 2 + 320


def test_files_that_hold_nothing_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nowhere.jsonl"):
        read_rows(tmp_path / "nowhere.jsonl")
    with pytest.raises(ValueError, match="holds no question"):
        read_rows(write_jsonl(tmp_path, "", " "))
    (tmp_path / "a.png").touch()
    with pytest.raises(ValueError, match="limit must be at least 1"):
        read_rows(write_jsonl(tmp_path, GOOD), limit=0)
    (tmp_path / "my.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not UTF-8"):
        read_rows(tmp_path / "my.jsonl")
