"""`pitome-vlm chat`: conversations, bad lines, Ctrl-C, and a real prompt."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from cli_runner import fails_in_one_line, run
from expected_answer import expected_answer
from pseudo_terminal import on_terminal
from transformers import LlavaForConditionalGeneration

from pitome_vlm.cli import chat

CHAT = ["--max-new-tokens", "4"]


def test_chat_answers_and_survives_bad_lines(checkpoint, image, files):
    lines = [
        "what is it?",
        "/keep 0.5",
        "/keep 7",
        "/keep much",
        "/tokens 1.5",
        "/tokens 999",
        "/imag x",
        "/image",
        f"/image {files['TEXT']}",
        "/image nowhere.png",
        "see <image>",
        "/info",
        "what is it?",
        f"/image '{image}' '{image}'",
        "/info",
        "which one?",
        "/reset",
        "/info",
        "/tokens 9",
        "/help",
        "",
        "/exit",
        "never asked",
    ]
    words = ["chat", "--model", checkpoint, "--image", image, "--tokens", 36, *CHAT]
    result = run(*words, text="\n".join(lines) + "\n")
    assert result.exit_code == 0
    answers = result.stdout.splitlines()
    assert len(answers) == 3
    assert answers[0] == expected_answer(checkpoint, image, "what is it?", 4, tokens=36)
    told = result.stderr.splitlines()
    errors = [line.removeprefix("error: ") for line in told if line.startswith("error: ")]
    for said, message in zip(
        errors,
        (
            "keep must be in (0, 1], got 7",
            "give a number, as in",
            "give a whole number, as in",
            "tokens must be in 1..144",
            "unknown command /imag. Did you mean '/image'?",
            "/image needs the path",
            "not an image",
            "nowhere.png: no such file",
            "must not contain '<image>'",
        ),
        strict=True,
    ):
        assert message in said
    states = [line for line in told if re.search(r"\d turns?$", line)]
    assert [re.findall(r"-> (\d+) .*; (\d+) images?, (\d+) turns?$", s)[0] for s in states] == [
        ("72", "1", "1"),
        ("72", "2", "0"),
        ("72", "2", "0"),
    ]
    assert "Merging with pitome_plus tokens=9: 144 -> 9 visual tokens per image" in told
    assert any("/image PATH" in line for line in told[-9:])


def test_chat_may_start_without_an_image_and_a_budget(checkpoint, image):
    text = f"hello\n/image {image}\nwhat is it?\n/keep 1\n"
    result = run("chat", "--model", checkpoint, *CHAT, text=text)
    assert result.exit_code == 0
    assert "Merging with keep=0.25 (default), pitome_plus: 144 -> 36" in result.stderr
    assert "No image yet" in result.stderr
    answers = result.stdout.splitlines()
    assert len(answers) == 2
    assert answers[1] == expected_answer(checkpoint, image, "what is it?", 4, keep=0.25)


def test_chat_continues_after_a_failure_in_the_model(checkpoint, image, monkeypatch):
    original = LlavaForConditionalGeneration.generate
    calls = []

    def fail_once(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("out of memory")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(LlavaForConditionalGeneration, "generate", fail_once)
    words = ["chat", "--model", checkpoint, "--image", image, *CHAT]
    result = run(*words, text="what is it?\n/info\nwhat is it?\n")
    assert result.exit_code == 0
    assert "error: out of memory" in result.stderr
    assert "1 image, 0 turns" in result.stderr
    assert result.stdout.strip() == expected_answer(checkpoint, image, "what is it?", 4, keep=0.25)


def test_chat_says_what_an_answer_took_and_changes_budget_and_algorithm(checkpoint, image):
    lines = ["what is it?", "/keep auto", "and now?", "/algorithm tome", "/algorithm tom"]
    lines += ["/algorithm", "/tokens 18", "and here?", "/algorithm none"]
    words = ["chat", "--model", checkpoint, "--image", image, *CHAT]
    result = run(*words, text="\n".join(lines) + "\n")
    assert result.exit_code == 0
    took = [line for line in result.stderr.splitlines() if "first token after" in line]
    pattern = r"(\d+) of 144 visual tokens, first token after [\d.]+ s, \d tokens? in [\d.]+ s"
    counts = [int(re.fullmatch(pattern, line)[1]) for line in took]
    assert counts[0] == 36
    assert 9 <= counts[1] <= 72  # the default range of an image's own budget
    assert counts[2] == 18
    assert "Merging with tome tokens=18" in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    assert "Did you mean 'tome'?" in errors[0]
    assert "/algorithm tome" in errors[1]
    assert "No merging" in result.stderr


@pytest.fixture(scope="module")
def endless(checkpoint, tmp_path_factory) -> str:
    """A checkpoint that never ends an answer by itself."""
    folder = Path(shutil.copytree(checkpoint, tmp_path_factory.mktemp("endless") / "model"))
    values = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(values | {"eos_token_id": 127}))
    return str(folder)


def test_ctrl_c_stops_an_answer_and_keeps_the_chat(endless, image, monkeypatch):
    pieces = []
    write = chat.write

    def interrupt_the_third(text, **how):
        pieces.append(text)
        if len(pieces) == 3:
            signal.raise_signal(signal.SIGINT)
        write(text, **how)

    monkeypatch.setattr(chat, "write", interrupt_the_third)
    limit = 1500
    words = ["--model", endless, "--image", image, "--max-new-tokens", limit]
    result = run("chat", *words, text="tell me everything\n/info\n/exit\n")
    assert result.exit_code == 0
    told = result.stderr.splitlines()
    assert "stopped" in told
    assert "1 image, 1 turn" in told[-1]
    assert 0 < len(result.stdout.split()) < limit
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("end", [KeyboardInterrupt, EOFError])
def test_ctrl_c_and_ctrl_d_at_the_prompt_leave(checkpoint, image, monkeypatch, end):
    lines = iter(["what is it?"])

    def typed(prompt):
        for line in lines:
            return line
        raise end

    monkeypatch.setattr("builtins.input", typed)
    result = run("chat", "--model", checkpoint, "--image", image, *CHAT)
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == 1
    assert "Traceback" not in result.stderr


def test_one_ctrl_c_at_a_prompt_says_how_to_leave(monkeypatch):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    typed = iter([KeyboardInterrupt, "/reset", KeyboardInterrupt, KeyboardInterrupt])

    def answer(prompt):
        line = next(typed)
        if line is KeyboardInterrupt:
            raise line
        return line

    monkeypatch.setattr("builtins.input", answer)
    said = []
    monkeypatch.setattr(chat, "say", said.append)
    talk = SimpleNamespace(reset=lambda: None)
    chat.Chat(talk).run()
    leave = "\nCtrl-D or /exit leaves, and so does a second Ctrl-C"
    assert said == [leave, "Conversation forgotten", leave]


def test_chat_in_a_terminal_shows_a_prompt_and_the_answer(checkpoint, image):
    words = ["chat", "--model", checkpoint, "--image", image, *CHAT]
    shown = on_terminal(*words, typed="/tokens 36\nwhat is it?\n/exit\n")
    assert shown.code == 0
    assert shown.text.count("\n> ") + shown.text.count("\r> ") >= 3
    assert "144 -> 36" in shown.text
    assert expected_answer(checkpoint, image, "what is it?", 4, tokens=36) in shown.text
    assert "Traceback" not in shown.text


def test_a_missing_image_is_one_line(checkpoint):
    message = "missing.png: no such file"
    fails_in_one_line(run("chat", "--model", checkpoint, "--image", "missing.png"), message)
