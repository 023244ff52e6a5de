"""`pitome-vlm ask`: the answer, the default budget, and every kind of bad input."""

from __future__ import annotations

import shutil

import pytest
import torch
from cli_runner import ABSENT_DEVICE, fails_in_one_line, run
from expected_answer import expected_answer

from pitome_vlm.merge.config import MergeConfig

DEFAULT = "Merging with keep=0.25 (default), pitome_plus: 144 -> 36 visual tokens per image"


@pytest.mark.parametrize("budget", [{"keep": 1}, {"tokens": 36}], ids=str)
def test_ask_prints_the_answer_and_nothing_else(checkpoint, image, budget):
    ((name, value),) = budget.items()
    words = ["ask", "--model", checkpoint, "--image", image, f"--{name}", value]
    result = run(*words, "--max-new-tokens", 5, "what is it?")
    assert result.exit_code == 0, result.stderr
    answer = expected_answer(checkpoint, image, "what is it?", 5, **budget)
    assert answer
    assert result.stdout == answer + "\n"
    assert result.stderr == ""


def test_without_a_budget_a_quarter_is_kept_and_that_is_said(checkpoint, image):
    words = ["ask", "-m", checkpoint, "-i", image, "--max-new-tokens", 4, "what is it?"]
    result = run(*words)
    assert result.stderr == DEFAULT + "\n"
    assert result.stdout == expected_answer(checkpoint, image, "what is it?", 4, keep=0.25) + "\n"
    chosen = run(*words, "--algorithm", "tome").stderr
    assert chosen == DEFAULT.replace("pitome_plus", "tome") + "\n"


def test_ask_tells_details_when_asked(checkpoint, image):
    words = ["-m", checkpoint, "-i", image, "--keep", 0.25, "--max-new-tokens", 2, "-v", "a"]
    result = run("ask", *words)
    assert "Merging with pitome_plus keep=0.25: 144 -> 36 visual tokens per image" in result.stderr
    assert "Answered in" in result.stderr
    assert len(result.stdout.splitlines()) == 1


def test_8_bit_layers_say_at_most_once_what_they_say_at_every_product(checkpoint, image, caplog):
    words = ["ask", "-m", checkpoint, "-i", image, "--load-8bit", "--max-new-tokens", 3, "a"]
    for more, most in (((), 0), (("-v",), 1)):
        caplog.clear()
        result = run(*words, *more)
        assert result.exit_code == 0, result.output
        said = [one.getMessage() for one in caplog.records if one.name.startswith("bitsandbytes")]
        assert len([text for text in said if "MatMul8bitLt" in text]) == most
        assert "MatMul8bitLt" not in result.stderr


def test_ask_takes_several_images(checkpoint, image):
    words = ["-m", checkpoint, "-i", image, "-i", image, "--tokens", 9, "--max-new-tokens", 3]
    result = run("ask", *words, "what?")
    assert result.exit_code == 0, result.stderr


def test_the_checkpoint_s_own_budget_comes_before_the_default(checkpoint, image, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    MergeConfig(tokens=20, algorithm="tome").save_pretrained(folder)
    words = ["ask", "-m", folder, "-i", image, "--max-new-tokens", 2, "what?"]
    own = "Merging with tokens=20 (from the checkpoint's pitome_config.json), tome: 144 -> 20"
    assert run(*words).stderr.startswith(own)
    words += ["-v"]
    assert "Merging with tome keep=0.5: 144 -> 72" in run(*words, "--keep", 0.5).stderr
    assert "No merging: 144 -> 144" in run(*words, "--algorithm", "none").stderr


def test_options_without_a_flag_of_their_own(checkpoint, image):
    words = ["ask", "-m", checkpoint, "-i", image, "--max-new-tokens", 2, "-v", "what?"]
    result = run(*words, "--option", "stage=tower", "--option", "layers=[0, 2]", "--keep", 0.5)
    assert "Merging with pitome_plus keep=0.5 stage=tower layers=(0, 2)" in result.stderr


def test_temperature_samples(checkpoint, image):
    words = ["ask", "-m", checkpoint, "-i", image, "--max-new-tokens", 8, "what?"]
    torch.manual_seed(0)
    assert len({run(*words, "--temperature", 5).stdout for _ in range(3)}) > 1


BAD = [
    (["--image", "IMAGE", "--keep", "0", "q"], "keep must be in (0, 1], got 0"),
    (["--image", "IMAGE", "--keep", "1.5", "q"], "keep must be in (0, 1], got 1.5"),
    (["--image", "IMAGE", "--keep", "half", "q"], "neither a number nor 'auto'"),
    (["--image", "IMAGE", "--keep", "0.5", "--quality", "0.9", "q"], "--keep auto"),
    (["--image", "IMAGE", "--keep", "auto", "--quality", "2", "q"], "quality must be in"),
    (["--image", "IMAGE", "--ratio", "-1", "q"], "ratio must be in (0, 1], got -1"),
    (["--image", "IMAGE", "--tokens", "0", "q"], "tokens must be a whole number"),
    (["--image", "IMAGE", "--tokens", "145", "q"], "tokens must be in 1..144"),
    (["--image", "IMAGE", "--keep", "0.5", "--tokens", "9", "q"], "exactly one of keep"),
    (["--image", "IMAGE", "--algorithm", "pitmoe", "q"], "Did you mean 'pitome'?"),
    (["--image", "IMAGE", "--preset", "realesed", "q"], "Did you mean 'released'?"),
    (["--image", "IMAGE", "--option", "stgae=tower", "q"], "Did you mean 'stage'?"),
    (["--image", "IMAGE", "--option", "stage", "q"], "option must be NAME=VALUE"),
    (["--image", "IMAGE", "--keep", "0.5", "--option", "keep=1", "q"], "keep is given twice"),
    (["--image", "IMAGE", "  "], "the question is empty"),
    (["--image", "IMAGE", "a \udcff b"], r"(the lone surrogate '\udcff') after 'a '; remove it"),
    (["--image", "IMAGE", "--keep", "1", "see <image>"], "must not contain '<image>'"),
    (["--image", "IMAGE", "--dtype", "int8", "q"], "dtype must be one of"),
    (["--image", "IMAGE", "--dtype", "fp16", "q"], "Did you mean 'float16'?"),
    (
        ["--image", "IMAGE", "--device", ABSENT_DEVICE, "q"],
        f"--device {ABSENT_DEVICE}: PyTorch finds",
    ),
    (["--image", "IMAGE", "--max-new-tokens", "0", "q"], "--max-new-tokens"),
    (["--image", "IMAGE", "--load-4bit", "--load-8bit", "q"], "only one of"),
    (["--image", "missing.png", "q"], "missing.png: no such file"),
    (["--image", "https://x.org/cat.png", "q"], "https://x.org/cat.png: URLs are not fetched"),
    (["--image", "TEXT", "q"], "not an image"),
    (["--image", "CUT", "q"], "damaged or cut off"),
    (["--image", "HUGE", "q"], "pixels; allowed"),
    (["--image", "IMAGE", "--device", "meta", "q"], "--device meta holds no weights"),
    (["--image", "IMAGE", "--preset", "paper", "--algorithm", "tome", "q"], "fixes the algorithm"),
    (["--image", "IMAGE", "--stage", "tower", "q"], "given with --option stage=VALUE"),
    (["q"], "nothing to ask about: give --image FILE, or --video FILE"),
    (["--image", "IMAGE", "q", "--kep", "0.5"], "No such option: --kep"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=str)
def test_bad_input_is_one_line_and_exit_code_2(words, message, files, checkpoint):
    for name, path in files.items():
        words = [word.replace(name, path) for word in words]
    fails_in_one_line(run("ask", "--model", checkpoint, *words), message)
