"""Dialogues of several rounds, and requests that cannot be answered."""

from __future__ import annotations

import pytest
from lmms_requests import SHORT, continuation, instance, messages, question, texts

from pitome_vlm.lmms.requests import RequestError
from pitome_vlm.lmms.tasks import demo_vqa


@pytest.mark.parametrize("simple", [False, True])
def test_rounds(lm, simple_lm, simple):
    lm = simple_lm if simple else lm
    asked = []

    def later(doc, *, previous_output, round_idx, previous_round_info):
        asked.append((doc["id"], round_idx, list(previous_output), previous_round_info))
        if round_idx > doc["scene_id"] % 2 + 1:
            return (None, None, True, None, None) if simple else (None, True, None, None)
        text = f"What colour is the {previous_output[-1]}?"
        image = demo_vqa.doc_to_visual(doc)
        if simple:
            return image, text, False, previous_output, {"seen": round_idx}
        return messages(doc | {"question": text}), False, previous_output, {"seen": round_idx}

    def request(number):
        if simple:
            args = (lm.task_dict["demo_vqa"]["test"][number]["question"], dict(SHORT))
            args += (demo_vqa.doc_to_visual, later)
        else:
            args = ("", lambda doc, **said: later(doc, **said) if said else messages(doc), SHORT)
        return instance("generate_until_multi_round", number, *args)

    numbers = [0, 1, 7, 6]  # scenes 0, 0, 1, 1
    found = lm.generate_until_multi_round([request(number) for number in numbers])
    assert [len(rounds) for rounds in found] == [2, 2, 3, 3]
    first = lm.generate_until([question(n) for n in numbers]) if not simple else None
    if first:
        assert [rounds[0] for rounds in found] == texts(first)
    assert ("test-0007", 2, list(found[2])[:2], {"seen": 1}) in asked
    (alone,) = lm.generate_until_multi_round([request(7)])
    assert list(alone) == list(found[2])
    assert alone.token_counts.input_tokens > 3 * 36


def test_a_task_without_rounds_is_asked_once(lm):
    request = instance("generate_until_multi_round", 0, "", lambda doc, **_: messages(doc), SHORT)
    assert len(lm.generate_until_multi_round([request])[0]) == 1


def test_endless_rounds_are_an_error(lm, monkeypatch):
    monkeypatch.setattr("pitome_vlm.lmms.model.MAX_ROUNDS", 3)
    endless = lambda doc, **said: (messages(doc), False, None, None) if said else messages(doc)  # noqa: E731
    request = instance("generate_until_multi_round", 2, "", endless, SHORT)
    with pytest.raises(RequestError, match="document 2: the task does not end after 3 rounds"):
        lm.generate_until_multi_round([request])


def broken_image(doc):
    return [{"role": "user", "content": [{"type": "image", "url": "/no/such/cat.png"}]}]


def a_video(doc):
    return [{"role": "user", "content": [{"type": "video", "url": "cat.mp4"}]}]


def two_marks(doc):
    return [{"role": "user", "content": f"<image> or <image>: {doc['question']}"}]


def half_a_character(doc):
    return [{"role": "user", "content": f"{doc['question']} \ud83d"}]


def raising(doc):
    raise KeyError("answer_key")


@pytest.mark.parametrize(
    ("to_messages", "said"),
    [
        (broken_image, "no such file"),
        (a_video, "this one holds video"),
        (two_marks, "marks 2 places for images with <image>, but there are 0"),
        (raising, "KeyError: 'answer_key'"),
        (half_a_character, r"ValueError: the prompt holds half of a character (the lone"),
    ],
)
def test_a_failing_request_names_its_document(lm, to_messages, said):
    requests = [question(number, to_messages if number == 6 else messages) for number in range(8)]
    with pytest.raises(RequestError, match="task 'demo_vqa', document 6: ") as caught:
        lm.generate_until(requests)
    assert said in str(caught.value)
    with pytest.raises(RequestError, match="document 6: "):
        lm.generate_until_multi_round(
            [instance("generate_until_multi_round", 6, "", to_messages, SHORT)]
        )


def test_a_failure_inside_the_model_names_its_document(lm, monkeypatch):
    generate = type(lm.model).generate
    poison = lm.processor.tokenizer("seven")["input_ids"][-1]

    def failing(self, **inputs):
        if (inputs["input_ids"] == poison).any():
            raise RuntimeError("out of memory")
        return generate(self, **inputs)

    monkeypatch.setattr(type(lm.model), "generate", failing)
    asks = lambda doc: messages(doc | {"question": "Is there a seven?"})  # noqa: E731
    requests = [question(number, asks if number == 2 else messages) for number in range(4)]
    with pytest.raises(RequestError, match="'demo_vqa', document 2: RuntimeError: out of memory"):
        lm.generate_until(requests)
    monkeypatch.setattr(type(lm.model), "generate", lambda self, **inputs: too_large(inputs))
    with pytest.raises(RequestError, match=r"document 0.*document 3: only together.*batch_size"):
        lm.generate_until([question(0), question(3)])


def too_large(inputs):
    if len(inputs["input_ids"]) > 1:
        raise RuntimeError("out of memory")
    return inputs["input_ids"]


def test_scoring_errors(simple_lm, docs):
    lm = simple_lm
    with pytest.raises(RequestError, match=r"document 1: ValueError: the continuation holds half"):
        lm.loglikelihood([continuation(0, " red", docs), continuation(1, " \ud83d", docs)])
    with pytest.raises(RequestError, match=r"document 1: ValueError: the continuation .* empty"):
        lm.loglikelihood([continuation(0, " red", docs), continuation(1, " ", docs)])
    request = instance("loglikelihood", 1)
    request.arguments = ("", " red")
    request.task_name = "demo_vqa"
    with pytest.raises(RequestError, match=r"document 1: .*acc_mutual_info"):
        lm.loglikelihood([request])
