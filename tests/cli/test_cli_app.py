"""The command group: help, version, wrong command lines, Ctrl-C, closed pipes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_runner import ABSENT_DEVICE, fails_in_one_line, run

from pitome_vlm.common import __version__

COMMANDS = ("demo", "ask", "chat", "info", "visualize", "eval", "tune", "verify", "train")
COMMANDS += ("serve", "serve-args", "bench", "web")
TESTS = Path(__file__).resolve().parents[1]


def test_help_is_fast_because_it_imports_neither_torch_nor_numpy():
    words = [["--help"], *([command, "--help"] for command in COMMANDS), ["--version"], []]
    script = (
        "import sys\nfrom typer.testing import CliRunner\nfrom pitome_vlm.cli import app\n"
        f"for words in {words!r}:\n"
        "    result = CliRunner().invoke(app, words)\n"
        "    assert result.exit_code == 0, result.output\n"
        "    assert result.stdout.strip()\n"
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib', 'peft'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_can_be_refused_at_once_is(tmp_path):
    for name in ("report.md", "pitome_config.json"):
        (tmp_path / name).touch()
    here = ["--output", str(tmp_path)]
    refused = {
        "Did you mean 'llava-1.5-7b'?": ["bench", "--config", "llava-1.5-7"],
        "No such option: --algorithm. Did you mean '--algorithms'?": ["bench", "--algorithm", "x"],
        "No such option: --no-plots. Did you mean '--no-plot'?": ["verify", "--no-plots"],
        "already holds report.md; choose another": ["bench", "--config", "tiny", *here],
        "already holds report.md; choose": ["verify", *here],
        "already holds pitome_config.json, report.md": [
            "tune",
            "-m",
            "demo",
            "--data",
            "demo",
            *here,
        ],
    }
    script = (
        "import sys\nfrom typer.testing import CliRunner\nfrom pitome_vlm.cli import app\n"
        f"for message, words in {refused!r}.items():\n"
        "    result = CliRunner().invoke(app, words)\n"
        "    assert result.exit_code == 2, result.output\n"
        "    assert message in result.stderr, result.stderr\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_lists_the_commands_and_examples():
    text = run("--help").stdout
    assert all(re.search(rf"\b{command}\b", text) for command in COMMANDS)
    assert "Examples" in text


@pytest.mark.parametrize(
    ("command", "panels", "options"),
    [
        (
            "chat",
            ("Visual tokens", "Loading", "Answer", "Messages"),
            ("--keep", "--tokens", "--ratio", "--algorithm", "--load-4bit", "--temperature"),
        ),
        ("tune", ("What is tuned", "How it is tuned", "Loading"), ("--max-loss", "--resume")),
        ("verify", ("Real features", "Synthetic clusters"), ("--sigma", "--overwrite")),
        ("train", ("Data", "Training", "Adapter"), ("--learning-rate", "--resume")),
        ("bench", ("What is timed", "How it is timed"), ("--algorithms", "--overwrite")),
        ("eval", ("What is measured", "How it is measured"), ("--algorithms", "--resume")),
    ],
)
def test_options_come_in_panels(command, panels, options):
    text = run(command, "--help").stdout
    assert all(f"─ {panel}" in text for panel in panels)
    assert all(option in text for option in options)


def test_version():
    assert run("--version").stdout == f"pitome-vlm {__version__}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["aks"], "No such command 'aks'"),
        (["--wat"], "No such option: --wat"),
        (["info"], "Missing option '--model' / '-m'; `--model demo` is the bundled one"),
        (
            ["bench", "demo"],
            "Unexpected 'demo': text with spaces needs quotes, and a value its option",
        ),
        (["info", "--model", "./nowhere"], "no such folder"),
        (["info", "--model", "Demo"], "ORGANISATION/NAME. Did you mean 'demo'?"),
        (["info", "--model", str(TESTS)], "no config.json"),
        (["info", "--model", __file__], "not a valid JSON file"),
        (["demo", "--questions", "2"], "questions must be in 9.."),
        (["demo", "--output", __file__], "output must be a folder"),
        (["bench"], "give either --model PATH or --config NAME"),
        (["bench", "--config", "tiny", "--dtype", "fp16"], "Did you mean 'float16'?"),
        (
            ["bench", "--config", "tiny", "--device", ABSENT_DEVICE],
            f"--device {ABSENT_DEVICE}: PyTorch finds",
        ),
        (["bench", "--config", "tiny", "--device", "gpu"], "--device must be cpu, cuda"),
    ],
    ids=str,
)
def test_bad_command_lines(words, message, tmp_path, monkeypatch):
    # Where nobody has run a command before, whose files would be found first.
    monkeypatch.chdir(tmp_path)
    fails_in_one_line(run(*words), message)


@pytest.mark.parametrize("place", ["before", "after"])
def test_debug_shows_the_traceback(checkpoint, image, place):
    words = ["ask", "--model", checkpoint, "--image", image, "--keep", "0", "q"]
    result = run("--debug", *words) if place == "before" else run(*words, "--debug")
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: keep must be")


def test_an_unforeseen_failure_is_one_line_too(checkpoint, image, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr("pitome_vlm.cli.engine.Conversation.ask", fail)
    result = run("ask", "--model", checkpoint, "--image", image, "--keep", 0.5, "q")
    fails_in_one_line(result, "RuntimeError: out of memory (run again with --debug")


def test_an_interrupt_in_any_command_is_one_line_and_130(checkpoint, image, monkeypatch):
    monkeypatch.setattr(
        "pitome_vlm.cli.engine.Conversation.ask", lambda *a, **k: signal.raise_signal(signal.SIGINT)
    )
    result = run("ask", "--model", checkpoint, "--image", image, "--keep", 0.5, "q")
    assert result.exit_code == 130
    assert result.stderr == "interrupted\n"
    assert result.stdout == ""


@pytest.mark.slow
def test_a_real_ctrl_c_is_one_line_and_leaves_nothing(tmp_path):
    words = ["--algorithms", "tome", "--seeds", "50000", "--no-features", "--verbose"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pitome_vlm", "verify", *words, "-o", tmp_path / "out"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        # A background job, as CI may be, ignores Ctrl-C and passes that on to its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr.readline() == "measuring tome\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.strip().splitlines()[-1] == "interrupted"
    assert "Traceback" not in stderr
    assert stdout == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_closed_pipe_is_no_crash(checkpoint):
    command = f"{sys.executable} -m pitome_vlm info --model '{checkpoint}' --keep 0.5 | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stderr == ""


@pytest.mark.parametrize(
    "words",
    [
        ("info", "--model", "demo", "--json"),
        ("serve-args", "demo", "--json"),
        ("bench", "--config", "tiny", "--repeats", 1, "--warmup", 0, "--keep", 0.5, "--json"),
    ],
    ids=lambda words: words[0],
)
def test_json_is_all_there_is_on_stdout(words):
    result = run(*words)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)
