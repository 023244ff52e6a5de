"""The conversation engine of `ask` and `chat`, without a terminal."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path

import pytest
import torch
from checkpoint import save_checkpoint
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration
from transformers.utils import logging

import pitome_vlm
from pitome_vlm.cli.engine import Conversation
from pitome_vlm.cli.terminal import one_line, printable, quiet
from pitome_vlm.measure import asking


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("llava"))


@pytest.fixture
def talk(folder) -> Conversation:
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    model.generation_config.eos_token_id = None
    processor = AutoProcessor.from_pretrained(folder)
    return Conversation(model, processor, 12, images=[Image.new("RGB", (50, 40), "red")])


class Plain:
    """A processor without a chat template."""

    chat_template = None
    image_token = "<image>"

    class tokenizer:
        eos_token = "</s>"
        bos_token = "<s>"


def prompt_of(processor, turns, question, images):
    talk = Conversation(None, processor, images=[Image.new("RGB", (9, 9))] * images, turns=turns)
    return asking.prompt_text(processor, talk._messages(question))


def test_prompt_follows_the_chat_template(folder):
    processor = AutoProcessor.from_pretrained(folder)
    text = prompt_of(processor, [("what is it?", "red")], "and now?", 2)
    said = "user: <image> <image> what is it? assistant: red </s> user: and now? assistant:"
    assert " ".join(text.split()) == said


def test_prompt_without_a_template_is_that_of_llava_1_5():
    assert prompt_of(Plain, [], "And now?", 1) == "USER: <image>\nAnd now? ASSISTANT:"
    assert prompt_of(Plain, [("What is it?", "A cat.")], "And now?", 1) == (
        "USER: <image>\nWhat is it? ASSISTANT: A cat.</s>USER: And now? ASSISTANT:"
    )
    assert prompt_of(Plain, [], "And now?", 0) == "USER: And now? ASSISTANT:"


def test_the_text_begins_with_one_bos_token(folder):
    processor = AutoProcessor.from_pretrained(folder)
    ids = [
        asking.encoded(processor, [start + "user: what"])["input_ids"][0] for start in ("", "<s> ")
    ]
    assert ids[0].tolist() == ids[1].tolist()
    assert (ids[0] == processor.tokenizer.bos_token_id).sum() == 1


@pytest.mark.parametrize("tokens", [None, 36])
def test_pieces_add_up_to_the_answer(talk, tokens):
    if tokens:
        pitome_vlm.wrap(talk.model, tokens=tokens)
    pieces: list[str] = []
    answer = talk.ask("what is it?", on_text=pieces.append)
    assert len(pieces) > 3
    assert "".join(pieces).strip() == answer
    talk.reset()
    assert talk.ask("what is it?") == answer


def test_later_answers_see_what_was_said(talk):
    first = talk.ask("what is it?")
    assert talk.turns == [("what is it?", first)]
    seen: list[torch.Tensor] = []
    original = talk.model.generate

    def record(**inputs):
        seen.append(inputs["input_ids"])
        return original(**inputs)

    talk.model.generate = record
    talk.ask("and now?")
    prompt = talk.processor.tokenizer.decode(seen[0][0]).replace(" ", "")
    assert first.replace(" ", "") in prompt
    assert prompt.count("user:") == 2
    talk.reset()
    talk.ask("and now?")
    assert talk.processor.tokenizer.decode(seen[1][0]).count("user:") == 1


def test_images_are_encoded_once_for_a_conversation(talk):
    pitome_vlm.wrap(talk.model, tokens=36)
    calls: list[int] = []
    talk.model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    for question in ("what is it?", "and now?", "sure?"):
        talk.ask(question)
    assert len(calls) == 1
    talk.show([Image.new("RGB", (9, 9))])
    talk.ask("and this?")
    assert len(calls) == 2


def test_another_number_of_tokens_keeps_the_conversation(talk):
    talk.ask("what is it?")
    pitome_vlm.wrap(talk.model, tokens=9)
    assert talk.ask("and now?")
    assert len(talk.turns) == 2


def test_a_stopped_answer_is_kept_as_far_as_it_came(talk):
    whole = talk.ask("what is it?")
    talk.reset()
    stop, pieces = threading.Event(), []

    def on_text(text: str) -> None:
        pieces.append(text)
        if len(pieces) == 3:
            stop.set()

    part = talk.ask("what is it?", on_text=on_text, stop=stop)
    assert part
    assert whole.startswith(part)
    assert len(part.split()) < len(whole.split())
    assert talk.turns == [("what is it?", part)]


def test_other_images_start_over(talk):
    talk.ask("what is it?")
    image = Image.new("RGB", (9, 9))
    talk.show([image, image])
    assert talk.turns == []
    assert talk.images == [image, image]
    assert talk.ask("which one?")


def test_after_an_error_nothing_is_remembered(talk):
    def fail(**inputs):
        raise RuntimeError("out of memory")

    talk.model.generate = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        talk.ask("what is it?")
    assert talk.turns == []


@pytest.mark.parametrize(
    ("question", "message"), [("  ", "empty"), ("is <image> red?", "must not contain '<image>'")]
)
def test_questions_that_cannot_be_asked(talk, question, message):
    with pytest.raises(ValueError, match=message):
        talk.ask(question)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"max_new_tokens": 0}, "max_new_tokens"), ({"temperature": -1.0}, "temperature")],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Conversation(None, None, **options)


def test_text_from_outside_cannot_steer_the_terminal():
    assert printable("a\x1b[2Jb\x07c\r\nd\te\x9b1m") == "a[2Jbc\nd\te1m"
    assert one_line(" two\n  lines\t") == "two lines"


def test_quiet_puts_everything_back(request):
    before = logging.get_verbosity()
    request.addfinalizer(lambda: logging.set_verbosity(before))
    logging.set_verbosity_info()
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    show = warnings.showwarning
    inside = []

    def fail() -> None:
        with quiet():
            inside.append(logging.is_progress_bar_enabled())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert inside == [False]
    assert logging.get_verbosity() == level
    assert logging.is_progress_bar_enabled() == bars
    assert warnings.showwarning is show


def test_warnings_are_one_line(capsys):
    with quiet():
        warnings.warn("something\nto know", stacklevel=1)
        warnings.warn("for developers", DeprecationWarning, stacklevel=1)
    assert capsys.readouterr().err == "warning: something to know\n"
