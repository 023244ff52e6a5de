"""The command line: every command, every kind of bad input, Ctrl-C, pipes."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint import save_checkpoint
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration
from typer.testing import CliRunner

import pitome_vlm
from pitome_vlm.cli import app
from pitome_vlm.common import __version__
from pitome_vlm.merge.config import MergeConfig

COMMANDS = ("demo", "ask", "chat", "info", "visualize", "eval", "tune", "verify", "train")
COMMANDS += ("serve", "serve-args", "bench")
PYTHON = (sys.executable, "-m", "pitome_vlm")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return str(save_checkpoint(tmp_path_factory.mktemp("llava")))


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("pictures") / "scene one.png"
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    return str(file)


def run(*words, text: str | None = None):
    return CliRunner().invoke(app, [str(word) for word in words], input=text)


def expected_answer(folder: str, picture: str, question: str, tokens: int, new_tokens: int) -> str:
    """The answer by transformers' own calls."""
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    if tokens:
        pitome_vlm.wrap(model, tokens=tokens)
    inputs = processor(
        images=Image.open(picture), text=f"user: <image> {question} assistant:", return_tensors="pt"
    )
    out = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    new = out[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(new, skip_special_tokens=True).strip()


# --- help and version


def test_help_is_fast_because_it_does_not_import_torch():
    words = [["--help"], *([command, "--help"] for command in COMMANDS), ["--version"], []]
    script = (
        "import sys\nfrom typer.testing import CliRunner\nfrom pitome_vlm.cli import app\n"
        f"for words in {words!r}:\n"
        "    result = CliRunner().invoke(app, words)\n"
        "    assert result.exit_code == 0, result.output\n"
        "    assert result.stdout.strip()\n"
        "heavy = {'torch', 'transformers', 'numpy'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_lists_the_commands_and_examples():
    text = run("--help").stdout
    assert all(re.search(rf"\b{command}\b", text) for command in COMMANDS)
    assert "Examples" in text


def test_options_come_in_panels():
    text = run("chat", "--help").stdout
    for panel in ("Visual tokens", "Loading", "Answer", "Messages"):
        assert f"─ {panel}" in text
    for option in ("--keep", "--tokens", "--ratio", "--algorithm", "--load-4bit", "--temperature"):
        assert option in text


def test_info_describes_a_preset():
    result = run("info", "--model", "demo", "--preset", "paper", "--tokens", 36)
    assert result.exit_code == 0, result.stderr
    assert "36" in result.stdout


def test_version():
    assert run("--version").stdout == f"pitome-vlm {__version__}\n"


# --- ask


@pytest.mark.parametrize("tokens", [0, 36])
def test_ask_prints_the_answer_and_nothing_else(checkpoint, picture, tokens):
    budget = ["--tokens", tokens] if tokens else []
    result = run(
        "ask",
        "--model",
        checkpoint,
        "--image",
        picture,
        *budget,
        "--max-new-tokens",
        5,
        "what is it?",
    )
    assert result.exit_code == 0, result.stderr
    answer = expected_answer(checkpoint, picture, "what is it?", tokens, 5)
    assert answer
    assert result.stdout == answer + "\n"
    assert result.stderr == ""


def test_ask_tells_details_when_asked(checkpoint, picture):
    result = run(
        "ask", "-m", checkpoint, "-i", picture, "--keep", 0.25, "--max-new-tokens", 2, "-v", "a"
    )
    assert "pitome_plus: 144 -> 36 visual tokens per image" in result.stderr
    assert len(result.stdout.splitlines()) == 1


def test_ask_takes_several_pictures(checkpoint, picture):
    one = ["ask", "-m", checkpoint, "-i", picture, "--tokens", 9, "--max-new-tokens", 3, "what?"]
    result = run(*one[:3], "-i", picture, *one[3:])
    assert result.exit_code == 0, result.stderr


def test_ask_without_a_budget_uses_the_checkpoint_s_own(checkpoint, picture, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    MergeConfig(tokens=20, algorithm="tome").save_pretrained(folder)
    words = ["ask", "-m", folder, "-i", picture, "--max-new-tokens", 2, "-v", "what?"]
    assert "tome: 144 -> 20" in run(*words).stderr
    assert "tome: 144 -> 72" in run(*words, "--keep", 0.5).stderr
    assert "none: 144 -> 144" in run(*words, "--algorithm", "none").stderr


def test_temperature_samples(checkpoint, picture):
    words = [
        "ask",
        "-m",
        checkpoint,
        "-i",
        picture,
        "--max-new-tokens",
        8,
        "--temperature",
        5,
        "what?",
    ]
    torch.manual_seed(0)
    answers = {run(*words).stdout for _ in range(3)}
    assert len(answers) > 1


# --- bad input


BAD = [
    (["ask", "--image", "PICTURE", "--keep", "0", "q"], "keep must be in (0, 1], got 0"),
    (["ask", "--image", "PICTURE", "--keep", "1.5", "q"], "keep must be in (0, 1], got 1.5"),
    (["ask", "--image", "PICTURE", "--keep", "half", "q"], "neither a number nor 'auto'"),
    (["ask", "--image", "PICTURE", "--keep", "0.5", "--quality", "0.9", "q"], "--keep auto"),
    (["ask", "--image", "PICTURE", "--keep", "auto", "--quality", "2", "q"], "quality must be in"),
    (["ask", "--image", "PICTURE", "--ratio", "-1", "q"], "ratio must be in (0, 1], got -1"),
    (["ask", "--image", "PICTURE", "--tokens", "0", "q"], "tokens must be a whole number"),
    (["ask", "--image", "PICTURE", "--tokens", "145", "q"], "tokens must be in 1..144"),
    (["ask", "--image", "PICTURE", "--keep", "0.5", "--tokens", "9", "q"], "exactly one of keep"),
    (["ask", "--image", "PICTURE", "--algorithm", "tome", "q"], "exactly one of keep"),
    (
        ["ask", "--image", "PICTURE", "--keep", "0.5", "--algorithm", "pitmoe", "q"],
        "Did you mean 'pitome'?",
    ),
    (
        ["ask", "--image", "PICTURE", "--keep", "0.5", "--preset", "realesed", "q"],
        "Did you mean 'released'?",
    ),
    (["ask", "--image", "PICTURE", "  "], "the question is empty"),
    (["ask", "--image", "PICTURE", "see <image>"], "must not contain '<image>'"),
    (["ask", "--image", "PICTURE", "--dtype", "int8", "q"], "dtype must be"),
    (["ask", "--image", "PICTURE", "--max-new-tokens", "0", "q"], "--max-new-tokens"),
    (["ask", "--image", "PICTURE", "--load-4bit", "--load-8bit", "q"], "only one of"),
    (["ask", "--image", "missing.png", "q"], "missing.png: no such file"),
    (["ask", "--image", "TEXT", "q"], "not an image"),
    (["ask", "--image", "CUT", "q"], "damaged or cut off"),
    (["ask", "--image", "HUGE", "q"], "pixels; allowed"),
    (["ask", "q"], "Missing option '--image'"),
    (["ask", "--image", "PICTURE", "q", "--kep", "0.5"], "No such option: --kep"),
    (["chat", "--image", "missing.png"], "missing.png: no such file"),
    (["info", "--keep", "2"], "keep must be in (0, 1]"),
    (["info", "--keep", "0.5", "--algorithm", "tom"], "Did you mean 'tome'?"),
    (["visualize", "--image", "TEXT"], "not an image"),
    (["visualize", "--image", "PICTURE", "--output", "figure.xyz"], "got figure.xyz"),
    (["visualize", "--image", "PICTURE", "--output", "PICTURE/below.png"], "scene one.png"),
]


@pytest.fixture(scope="module")
def files(picture, tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bad")
    text, cut, huge = folder / "text.jpg", folder / "cut.png", folder / "huge.png"
    text.write_text("This is no picture.\n")
    cut.write_bytes(Path(picture).read_bytes()[:5000])
    Image.new("1", (20_000, 10_000)).save(huge)
    return {"PICTURE": picture, "TEXT": str(text), "CUT": str(cut), "HUGE": str(huge)}


def fails_in_one_line(result, message: str) -> None:
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert "Traceback" not in line


@pytest.mark.parametrize(("words", "message"), BAD, ids=str)
def test_bad_input_is_one_line_and_exit_code_2(words, message, files, checkpoint):
    for name, path in files.items():
        words = [word.replace(name, path) for word in words]
    fails_in_one_line(run(words[0], "--model", checkpoint, *words[1:]), message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["aks"], "No such command 'aks'"),
        (["--wat"], "No such option: --wat"),
        (["info"], "Missing option '--model'"),
        (["info", "--model", "./nowhere"], "no such folder"),
        (["info", "--model", str(ROOT / "tests")], "no config.json"),
        (["info", "--model", __file__], "not a valid JSON file"),
        (["demo", "--questions", "2"], "questions must be in 9.."),
        (["demo", "--output", __file__], "output must be a folder"),
    ],
    ids=str,
)
def test_bad_command_lines(words, message):
    fails_in_one_line(run(*words), message)


def test_debug_shows_the_traceback(checkpoint, picture):
    words = ["ask", "--model", checkpoint, "--image", picture, "--keep", "0", "q"]
    result = run(*words, "--debug")
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: keep must be")


def test_an_unforeseen_failure_is_one_line_too(checkpoint, picture, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(LlavaForConditionalGeneration, "generate", fail)
    result = run("ask", "--model", checkpoint, "--image", picture, "q")
    fails_in_one_line(result, "RuntimeError: out of memory (run again with --debug")


# --- chat


CHAT = ["--max-new-tokens", "4"]


def test_chat_answers_and_survives_bad_lines(checkpoint, picture, files):
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
        f"/image '{picture}' '{picture}'",
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
    words = ["chat", "--model", checkpoint, "--image", picture, "--tokens", 36, *CHAT]
    result = run(*words, text="\n".join(lines) + "\n")
    assert result.exit_code == 0
    answers = result.stdout.splitlines()
    assert len(answers) == 3
    assert answers[0] == expected_answer(checkpoint, picture, "what is it?", 36, 4)
    told = result.stderr.splitlines()
    errors = [line.removeprefix("error: ") for line in told if line.startswith("error: ")]
    for said, message in zip(
        errors,
        (
            "keep must be in (0, 1], got 7",
            "a number is needed",
            "a whole number is needed",
            "tokens must be in 1..144",
            "unknown command /imag. Did you mean '/image'?",
            "which picture?",
            "not an image",
            "nowhere.png: no such file",
            "must not contain '<image>'",
        ),
        strict=True,
    ):
        assert message in said
    states = [line for line in told if "turn(s)" in line]
    assert [re.findall(r"-> (\d+) .*; (\d+) picture\(s\), (\d+) turn", s)[0] for s in states] == [
        ("72", "1", "1"),
        ("72", "2", "0"),
        ("72", "2", "0"),
    ]
    assert "pitome_plus: 144 -> 9 visual tokens per image" in told
    assert any("/image PATH" in line for line in told[-8:])


def test_chat_may_start_without_a_picture_or_merging(checkpoint, picture):
    text = f"hello\n/image {picture}\nwhat is it?\n/tokens 36\n"
    result = run("chat", "--model", checkpoint, *CHAT, text=text)
    assert result.exit_code == 0
    assert "no merging" in result.stderr
    assert "No picture yet" in result.stderr
    answers = result.stdout.splitlines()
    assert len(answers) == 2
    assert answers[1] == expected_answer(checkpoint, picture, "what is it?", 0, 4)


def test_chat_goes_on_after_a_failure_in_the_model(checkpoint, picture, monkeypatch):
    original = LlavaForConditionalGeneration.generate
    calls = []

    def fail_once(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("out of memory")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(LlavaForConditionalGeneration, "generate", fail_once)
    words = ["chat", "--model", checkpoint, "--image", picture, *CHAT]
    result = run(*words, text="what is it?\n/info\nwhat is it?\n")
    assert result.exit_code == 0
    assert "error: out of memory" in result.stderr
    assert "0 turn(s)" in result.stderr
    assert result.stdout.strip() == expected_answer(checkpoint, picture, "what is it?", 0, 4)


def test_scripts_chat_is_the_same_chat(checkpoint, picture):
    words = ["--model", checkpoint, "--image", picture, "--tokens", "36", *CHAT]
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "chat.py"), *words],
        input="what is it?\n",
        capture_output=True,
        text=True,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == expected_answer(checkpoint, picture, "what is it?", 36, 4)


class Process:
    """A real command with pipes, read without blocking for ever."""

    def __init__(self, *words: str) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [*PYTHON, *words],
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            env=environment,
            # A person's shell does not ignore Ctrl-C; a background job, as CI may be, does, and
            # passes that on to its children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self.text = {"stdout": "", "stderr": ""}

    def wait_for(self, name: str, text: str, seconds: float = 120) -> None:
        stream, end = getattr(self.process, name), time.monotonic() + seconds
        while text not in self.text[name]:
            left = end - time.monotonic()
            ready = select.select([stream], [], [], max(0, left))[0]
            data = os.read(stream.fileno(), 65536).decode() if ready else ""
            assert data, f"{text!r} never came: {self.text}"
            self.text[name] += data

    def send(self, line: str) -> None:
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def end(self) -> int:
        out, err = self.process.communicate(timeout=120)
        self.text["stdout"] += out.decode()
        self.text["stderr"] += err.decode()
        return self.process.returncode


@pytest.fixture
def start():
    started = []

    def begin(*words: str) -> Process:
        started.append(Process(*words))
        return started[-1]

    yield begin
    for each in started:
        each.process.kill()
        each.process.wait()


@pytest.fixture(scope="module")
def endless(checkpoint, tmp_path_factory) -> str:
    """A checkpoint that never ends an answer by itself."""
    folder = Path(shutil.copytree(checkpoint, tmp_path_factory.mktemp("endless") / "model"))
    values = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(values | {"eos_token_id": 127}))
    return str(folder)


def test_ctrl_c_stops_an_answer_and_keeps_the_chat(endless, picture, start):
    limit = 1500
    chat = start("chat", "--model", endless, "--image", picture, "--max-new-tokens", str(limit))
    chat.send("tell me everything")
    chat.wait_for("stdout", " ")
    chat.interrupt()
    chat.wait_for("stderr", "stopped")
    chat.send("/info")
    chat.wait_for("stderr", "1 turn(s)")
    chat.send("/exit")
    assert chat.end() == 0
    assert 0 < len(chat.text["stdout"].split()) < limit
    assert "Traceback" not in chat.text["stderr"]


def test_chat_in_a_terminal_prompts_and_leaves_on_ctrl_d(checkpoint, picture):
    keyboard, terminal = pty.openpty()
    words = ["chat", "--model", checkpoint, "--image", picture, *CHAT]
    with subprocess.Popen(
        [*PYTHON, *words], stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True
    ) as process:
        os.close(terminal)
        shown = ""

        def wait_for_prompt(number: int) -> None:
            nonlocal shown
            while shown.count("> ") < number:
                assert select.select([keyboard], [], [], 120)[0], shown
                shown += os.read(keyboard, 65536).decode()

        # The line that says what is merged has an arrow, the first "> ".
        wait_for_prompt(1)
        os.write(keyboard, b"/tokens 36\n")
        wait_for_prompt(3)
        os.write(keyboard, b"what is it?\n")
        wait_for_prompt(4)
        os.write(keyboard, b"\x04")
        assert process.wait(60) == 0
        os.close(keyboard)
    assert "144 -> 36" in shown
    assert expected_answer(checkpoint, picture, "what is it?", 36, 4) in shown
    assert "Traceback" not in shown


def test_ctrl_c_at_the_prompt_leaves(checkpoint, picture, start):
    chat = start("chat", "--model", checkpoint, "--image", picture, *CHAT)
    chat.send("what is it?")
    chat.wait_for("stdout", "\n")
    time.sleep(0.5)
    chat.interrupt()
    assert chat.end() == 0
    assert "Traceback" not in chat.text["stderr"]


def test_ctrl_c_elsewhere_is_interrupted_130(endless, picture, start):
    ask = start("ask", "-m", endless, "-i", picture, "--max-new-tokens", "60000", "-v", "tell me")
    ask.wait_for("stderr", "no merging")
    time.sleep(0.5)
    ask.interrupt()
    assert ask.end() == 130
    assert ask.text["stderr"].splitlines()[-1] == "interrupted"
    assert "Traceback" not in ask.text["stderr"]


def test_a_closed_pipe_is_no_crash(checkpoint):
    command = f"{' '.join(PYTHON)} info --model '{checkpoint}' | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stderr == ""


# --- info


def test_info_counts_without_weights(checkpoint, tmp_path):
    shutil.copy(Path(checkpoint) / "config.json", tmp_path)
    text = run("info", "--model", tmp_path, "--tokens", 36).stdout
    assert "144 -> 36 visual tokens" in text
    as_json = run("info", "--model", tmp_path / "config.json", "--tokens", 36, "--json")
    values = json.loads(as_json.stdout)
    assert values["tokens_out"] == 36
    kv = values["costs"]["kv_bytes_per_image"]
    # 2 layers x (key + value) x 2 heads x 16 wide x 4 bytes per token.
    assert kv["without"] == 144 * 2 * 2 * 2 * 16 * 4
    assert kv["with"] == 36 * 2 * 2 * 2 * 16 * 4


def test_info_reads_the_checkpoint_s_own_merging(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    MergeConfig(tokens=20, algorithm="tome").save_pretrained(folder)
    saved, changed = (
        json.loads(run("info", "--model", folder, "--json", *more).stdout)["config"]
        for more in ([], ["--keep", "0.5"])
    )
    assert (saved["algorithm"], saved["tokens"]) == ("tome", 20)
    assert (changed["algorithm"], changed["tokens"], changed["keep"]) == ("tome", None, 0.5)


def test_the_bundled_model_is_called_demo():
    values = json.loads(run("info", "--model", "demo", "--json").stdout)
    assert (values["tokens_in"], values["tokens_out"]) == (144, 36)


# --- visualize


def test_visualize_writes_the_picture(checkpoint, picture, tmp_path):
    target = tmp_path / "new" / "figure.png"
    words = ["visualize", "--model", checkpoint, "--image", picture, "--output", target]
    result = run(*words, "--size", 240)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.replace("\n", "") == str(target)
    assert Image.open(target).size == (240, 156)  # 90 x 60 pixels in 12 x 12 patches


def test_visualize_compares_at_equal_tokens(checkpoint, picture, tmp_path):
    target = tmp_path / "figure.png"
    words = ["visualize", "--model", checkpoint, "--image", picture, "--output", target]
    result = run(*words, "--ratio", 0.8, "--compare", "--size", 120, "-v")
    assert result.exit_code == 0, result.stderr
    assert Image.open(target).width > 5 * 120


# --- demo


@pytest.mark.slow
def test_demo_tells_the_whole_story(tmp_path, monkeypatch):
    from pitome_vlm.cli import demo_run

    monkeypatch.setattr(demo_run, "TIMED_RUNS", 2)
    result = run("demo", "--questions", 9, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    rows = re.findall(r"(no merging|PiToMe\+|ToMe|random|pool) +(\d+) +[\d.]+ %", result.stdout)
    merged = [
        (name, n) for n in ("72", "36", "16") for name in ("PiToMe+", "ToMe", "random", "pool")
    ]
    assert rows == [("no merging", "144"), *merged]
    assert "A small sample" in result.stdout
    assert "eval/results/demo" in result.stdout
    flat = result.stdout.replace("\n", "")
    for name in ("scene.png", "overlay.png", "report.html"):
        assert f"wrote {tmp_path / 'out' / name}" in flat
    assert Image.open(tmp_path / "out" / "overlay.png").width > 5 * 300
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("<img") == 6
    assert page.count("<tr") == 2 + 13 + page.count("?</td>")


def test_the_sample_is_balanced_and_depends_on_the_seed_only():
    from collections import Counter

    from pitome_vlm.cli.demo_run import balanced, choose_scene, held_out

    samples = held_out()
    chosen = balanced(samples, 30, seed=3)
    counts = Counter(sample.question_type for sample in chosen)
    assert len(chosen) == len(set(chosen)) == 30
    assert max(counts.values()) - min(counts.values()) <= 1
    assert len(counts) == 9
    assert chosen == balanced(samples, 30, seed=3) != balanced(samples, 30, seed=4)
    scene = choose_scene(samples, 0)
    assert len(scene) >= 5
    assert len({sample.scene_id for sample in scene}) == 1
