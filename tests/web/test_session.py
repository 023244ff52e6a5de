"""What the page does, without Gradio: answers, limits, visitors at once, settings, HTML."""

from __future__ import annotations

import re
import shlex
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import typer.main
from PIL import Image

import pitome_vlm
from pitome_vlm.cli import app
from pitome_vlm.cli.options import merge_options
from pitome_vlm.demo import scene_image
from pitome_vlm.demo.scenes import KINDS
from pitome_vlm.demo.structured import STRUCTURED_KINDS
from pitome_vlm.loading.images import ImageLimits
from pitome_vlm.measure import asking
from pitome_vlm.measure.visualize import overlay, overlay_svg, source_map
from pitome_vlm.merge import algorithms, registry
from pitome_vlm.merge.algorithm import Algorithm
from pitome_vlm.web import session as sessions
from pitome_vlm.web.examples import write_examples
from pitome_vlm.web.render import compared_html, methods_html, problem_html
from pitome_vlm.web.session import Limits, Refusal, Session, command_line, wrap_line
from pitome_vlm.wrapping.wrap import is_wrapped

QUESTION = "Which number is the orange number?"
LIMITS = Limits(ImageLimits(max_bytes=200_000, max_pixels=500_000), question=60, answer=4)


@pytest.fixture(scope="module")
def session():
    model, processor = pitome_vlm.load("demo", dtype="float32")
    config = pitome_vlm.MergeConfig(keep=0.25, stage="projector")
    return Session(model, processor, config, "demo", LIMITS)


@pytest.fixture(scope="module")
def scene():
    return scene_image(2, "val")


@pytest.fixture(autouse=True)
def one_timed_run(monkeypatch):
    monkeypatch.setattr(sessions, "_RUNS", 1)


def answer_of(session, scene):
    prompt = asking.question_prompt(session.processor, QUESTION)
    batch = asking.encoded(session.processor, [prompt], [scene])
    (text,) = asking.answers(session.model, session.processor, batch, max_new_tokens=4)
    return text


def test_answers_are_those_of_the_model_without_and_with_merging(session, scene):
    before, after = session.compare(scene, QUESTION, 0.125, "pool")
    assert not is_wrapped(session.model)
    assert before.answer.text == answer_of(session, scene) == "six"
    with pitome_vlm.wrapped(session.model, keep=0.125, algorithm="pool"):
        assert after.answer.text == answer_of(session, scene)
    assert (before.full, before.visual, before.parts) == (144, 144, [])
    assert (after.full, after.visual) == (144, 18)
    assert after.parts[0].groups.tokens == 18
    assert min(before.first_token_ms, after.first_token_ms) > 0
    assert 1 < before.answer.tokens <= 4
    assert 0 < before.answer.first_token_s <= before.answer.total_s


def test_the_page_starts_with_what_the_command_line_asked_for(session):
    assert session.algorithms[0] == "pitome_plus"
    assert "none" not in session.algorithms
    assert session.keep == 0.25
    assert session.settings(0.5, "pitome_plus").stage == "projector"
    assert session.settings(0.5, "tome") == pitome_vlm.MergeConfig(keep=0.5, algorithm="tome")
    counted = pitome_vlm.MergeConfig(tokens=18, algorithm="tome")
    other = Session(session.model, session.processor, counted, "demo", LIMITS)
    assert other.keep == 0.12
    assert other.algorithms[0] == "tome"


def test_every_method_answers_at_equal_tokens_or_says_why_not(session, scene, monkeypatch):
    some = ["divprune", "never", "none", "pitome_plus", "pool"]
    monkeypatch.setattr(algorithms, "available", lambda: some)

    def plan(keys, n_out, *, ctx):
        raise ValueError("this one never works")

    algorithms.register(Algorithm("never", plan, "this test"))
    try:
        found, unmerged = session.methods(scene, QUESTION, 0.25)
    finally:
        registry._known.pop("never")
    *replies, refusal = found
    assert refusal == Refusal("never", "this one never works")
    assert [reply.config.algorithm for reply in replies] == ["pitome_plus", "divprune", "pool"]
    assert {reply.visual for reply in replies} == {36}
    page = methods_html(found, unmerged)
    assert page.count("<svg") == len(replies)
    assert "this one never works" in page
    differing = sum(reply.answer.text != "six" for reply in replies)
    assert page.count("pv-answer pv-differs") == differing
    assert not is_wrapped(session.model)


def test_what_is_beyond_the_limits_is_refused_in_one_line(session, scene, tmp_path):
    broken, page, long = tmp_path / "cut.png", tmp_path / "page.png", Image.new("L", (1, 1))
    scene.save(broken)
    broken.write_bytes(broken.read_bytes()[:1500])
    page.write_text("<html>")
    large, heavy = tmp_path / "large.png", tmp_path / "heavy.bmp"
    Image.new("1", (1000, 501)).save(large)
    Image.new("RGB", (300, 300)).save(heavy)
    good = (scene, QUESTION, 0.25, "tome")
    for place, value, message in (
        (0, None, "no image: upload one"),
        (0, str(broken), "cut.png"),
        (0, str(page), "not an image"),
        (0, str(large), "501000 pixels"),
        (0, str(heavy), "bytes"),
        (0, "http://127.0.0.1/cat.png", "127.0.0.1"),
        (0, "/etc", "/etc"),
        (1, "", "the question is empty"),
        (1, "a" * 61, "the question has 61 characters; at most 60"),
        (1, "what is <image>?", "must not contain"),
        (1, 7, "must be a text"),
        (2, 0.0, "keep must be in"),
        (2, 1.5, "keep must be in"),
        (3, "none", "merges nothing"),
        (3, "tom", "Did you mean 'tome'?"),
    ):
        asked = [*good]
        asked[place] = value
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            session.compare(*asked)
        assert "\n" not in str(caught.value)
    with pytest.raises(TypeError, match="keep must be a number"):
        session.compare(scene, QUESTION, "0.25", "tome")
    assert session.compare(long, "what?", 0.25, "tome")[0].full == 144


def test_visitors_take_turns_and_get_their_own_answers(session, scene):
    names, alone = ["pool", "tome"] * 2, {}
    for name in set(names):
        with pitome_vlm.wrapped(session.model, keep=0.11, algorithm=name):
            alone[name] = answer_of(session, scene)
    with ThreadPoolExecutor(4) as visitors:
        found = list(visitors.map(lambda a: session.compare(scene, QUESTION, 0.11, a), names))
    for algorithm, (before, after) in zip(names, found, strict=True):
        assert before.answer.text == "six"
        assert after.config.algorithm == algorithm
        assert after.answer.text == alone[algorithm]


def test_settings_can_be_pasted():
    configs = [
        pitome_vlm.MergeConfig(keep=0.25),
        pitome_vlm.MergeConfig(keep=0.3, algorithm="tome", layers=(1, 2), size_bias=False),
        pitome_vlm.MergeConfig.preset("paper", keep=0.5),
        pitome_vlm.MergeConfig(keep=0.25, energy="elu", algorithm="pitome"),
    ]
    ask = typer.main.get_command(app).commands["ask"]
    for config in configs:
        options = eval(wrap_line(config).removeprefix("model = pitome_vlm.wrap(model, ")[:-1].join(
            ["dict(", ")"]))  # fmt: skip
        assert pitome_vlm.MergeConfig(**options) == config
        for question in ('what\'s "this"?', "-3?", "--keep"):
            words = shlex.split(command_line(config, "my models/llava", question))
            assert words[:2] == ["pitome-vlm", "ask"]
            given = ask.make_context("ask", words[2:]).params
            assert (given["question"], given["model"]) == (question, "my models/llava")
            chosen = {name: given[name] for name in ("keep", "algorithm", "option")}
            assert pitome_vlm.MergeConfig(**merge_options(**chosen)) == config


def test_html_shows_text_as_text(session, scene):
    replies = session.compare(scene, QUESTION, 0.25, "pitome_plus")
    page = compared_html(replies)
    assert page.count('class="pv-answer"') == 2
    assert "36 of 144" in page
    object.__setattr__(replies[1].answer, "text", "<script>alert(1)</script>")
    page = compared_html(replies)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "The answers differ." in page
    assert "<b>" not in problem_html("no such\n image: <b>")


@pytest.mark.parametrize("algorithm", ["pitome_plus", "divprune"])
def test_every_patch_is_in_one_group_of_the_svg(session, scene, algorithm):
    with pitome_vlm.wrapped(session.model, keep=0.25, algorithm=algorithm):
        groups = source_map(session.model, session.processor, scene)
    svg = overlay_svg(overlay(scene, groups), groups)
    cells = re.findall(r"M(\d+) (\d+)h1v1h-1z", svg)
    assert len(cells) == len(set(cells)) == 144
    kept = 36 if groups.seen is None else int(groups.seen.sum())
    assert svg.count("one token</title>") == min(kept, 36)
    assert ("patches dropped</title>" in svg) == (groups.seen is not None)


def test_examples_are_one_scene_of_every_kind(tmp_path):
    found = write_examples(tmp_path)
    assert len(found) == len(KINDS) + len(STRUCTURED_KINDS)
    assert len({file for file, _ in found}) == len(found)
    for file, question in found:
        assert Image.open(file).size == (192, 192)
        assert question.startswith(("What", "Which", "How", "Count", "In which", "Where", "Is the"))
        assert not question.startswith("Is the") or " or " in question


def test_answers_do_not_depend_on_whether_pieces_are_wanted(session, scene):
    from pitome_vlm.measure.answering import answer

    prompt = asking.question_prompt(session.processor, QUESTION)
    batch = asking.encoded(session.processor, [prompt], [scene])
    pieces: list[str] = []
    torch.manual_seed(0)
    heard = answer(session.model, session.processor, batch, on_text=pieces.append, max_new_tokens=4)
    quiet = answer(session.model, session.processor, batch, max_new_tokens=4)
    assert (heard.text, heard.tokens) == (quiet.text, quiet.tokens)
    assert "".join(pieces).strip() == heard.text
    assert all(0 < one.first_token_s < one.total_s for one in (heard, quiet))
