"""`pitome-vlm tune`: a whole run, resuming, Ctrl-C, every kind of bad input."""

from __future__ import annotations

import json
import re
import signal

import pytest
from absent import hide
from typer.testing import CliRunner

from pitome_vlm.cli import app
from pitome_vlm.demo import load_split, scene_image
from pitome_vlm.measure.tune import asking
from pitome_vlm.merge.config import MergeConfig

QUICK = (
    "--algorithms",
    "tome,pitome:stage=projector",
    "--tokens",
    "72,36",
    "--max-new-tokens",
    "2",
)
FILES = {"pitome_config.json", "report.md", "result.json", "loss_tokens.png"}


def run(*words):
    return CliRunner().invoke(app, ["tune", "--model", "demo", *(str(word) for word in words)])


def demo_run(output, *words, limit=24):
    return run("--data", "demo", "--limit", limit, *QUICK, "--output", output, *words)


def fails(result, message):
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert lines[-1].startswith("error: ")
    assert message in lines[-1]
    assert "Traceback" not in result.stderr
    return lines


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned") / "out"
    return folder, demo_run(folder)


def numbers(folder):
    """result.json without what a clock says."""
    text = (folder / "result.json").read_text()
    return re.sub(
        r'"(seconds|ms|merged_ms)": [\d.e-]+|First token of one question: [^"]*', "", text
    )


def test_a_run_ends_with_the_statement_the_config_and_a_report(finished):
    folder, result = finished
    assert result.exit_code == 0, result.stderr
    found = json.loads((folder / "result.json").read_text())
    lines = result.stdout.splitlines()
    assert lines[0] == MergeConfig.from_pretrained(folder).summary()
    assert found["statement"] in lines
    assert found["against_smaller"] in lines
    assert "for this data. First token of one question: " in found["against_smaller"]
    assert {line.rsplit("/", 1)[1] for line in lines[-4:]} == FILES
    assert MergeConfig.from_dict(found["config"]) == MergeConfig.from_pretrained(folder)
    assert found["statement"] in (folder / "report.md").read_text()
    assert found["facts"]["seed"] == 0
    cells = [line for line in result.stderr.splitlines() if line.startswith("search: ")]
    assert len(cells) == len(found["search"])
    assert re.match(
        r"search: tome, 72 tokens: loss -?\d+\.\d % \(-?\d+\.\d to \d+\.\d %\), \d+ s"
        r", at most \d+ (s|min) left$",
        cells[0],
    )
    assert sum(line.startswith("note: ") for line in result.stderr.splitlines()) == len(
        found["notes"]
    )


def test_only_the_validation_split_of_the_demo_is_used(finished):
    folder, _ = finished
    answers = [json.loads(path.read_text()) for path in (folder / "cells").iterdir()]
    asked = sum(len(a["answers"]) for a in answers if a["recipe"] == "unreduced")
    assert asked == len(load_split("val", 24))


def test_a_second_run_is_refused_and_resume_keeps_everything(finished):
    folder, _ = finished
    fails(demo_run(folder), f"{folder} already holds")
    before = numbers(folder)
    result = demo_run(folder, "--resume")
    assert result.exit_code == 0, result.stderr
    cells = [line for line in result.stderr.splitlines() if re.match("search|check", line)]
    assert cells
    assert all("kept from an earlier run" in line for line in cells)
    assert numbers(folder) == before
    fails(demo_run(folder, "--resume", limit=30), "questions was 24, is 30")
    fails(demo_run(folder, "--resume", "--seed", 1), "seed was 0, is 1")


@pytest.mark.slow
def test_ctrl_c_between_cells_is_130_and_resumes_to_the_same_result(
    finished, tmp_path, monkeypatch
):
    folder, _ = finished
    original, calls = asking.ModelAsker.ask, []

    def interrupted(self, *words):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return original(self, *words)

    with monkeypatch.context() as patch:
        patch.setattr(asking.ModelAsker, "ask", interrupted)
        result = demo_run(tmp_path / "out")
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == (
        f"interrupted; finished settings are in {tmp_path / 'out'}, --resume continues"
    )
    assert not FILES & {path.name for path in (tmp_path / "out").iterdir()}
    result = demo_run(tmp_path / "out", "--resume")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count("kept from an earlier run") == 1
    assert numbers(tmp_path / "out") == numbers(folder)


# --- one's own data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    lines = []
    for sample in load_split("val", 40)[::3]:
        name = f"{sample.scene_id}.png"
        scene_image(sample.scene_id, "val").save(folder / name)
        lines.append({"image": name, "question": sample.question, "answer": sample.answer})
    return folder, lines


def write(folder, lines, name="my.jsonl"):
    file = folder / name
    file.write_text("\n".join(v if isinstance(v, str) else json.dumps(v) for v in lines))
    return file


ONE = ("--algorithms", "tome", "--tokens", "72", "--max-new-tokens", "2")


@pytest.mark.slow
def test_own_data_without_answers_and_without_a_plot(data, tmp_path):
    folder, lines = data
    bare = [{key: line[key] for key in ("image", "question")} for line in lines]
    given = [write(folder, bare, "bare.jsonl"), write(folder, lines)]
    results = []
    for file, more in zip(given, ([], ["--ignore-answers"]), strict=True):
        output = tmp_path / file.stem
        result = run("--data", file, *ONE, "--no-plot", "--output", output, *more)
        assert result.exit_code == 0, result.stderr
        assert not (output / "loss_tokens.png").exists()
        assert "loss_tokens" not in (output / "report.md").read_text()
        results.append(numbers(output))
    assert results[0] == results[1]
    assert '"answered": false' in results[0]
    assert "agreement with the unreduced model" in results[0]


def test_a_suffix_reaches_the_model(finished):
    # Prompts are among what decides the answers that are kept.
    folder, _ = finished
    again = demo_run(folder, "--resume", "--suffix", "answer with one word .")
    fails(again, "with other settings (data was 'sha256:")


BAD_LINES = [
    ("{oops", "my.jsonl line 3 is not valid JSON"),
    ({"question": "what?", "answer": "a"}, "my.jsonl line 3 has no 'image'"),
    ({"image": "0.png", "answer": "a"}, "my.jsonl line 3 needs a 'question'"),
    ({"image": "gone.png", "question": "q", "answer": "a"}, "my.jsonl line 3:"),
    ({"image": "gone.png", "question": "q", "answer": "a"}, "no such image file: "),
    ({"image": "text.png", "question": "q", "answer": "a"}, "text.png: not an image"),
    ({"image": "0.png", "question": "q"}, "my.jsonl line 3 has no answer but"),
    ({"image": "http://x.org/a.png", "question": "q", "answer": "a"}, "URLs are not fetched"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES, ids=str)
def test_a_bad_line_is_named_in_one_line(data, tmp_path, line, message):
    folder, lines = data
    (folder / "text.png").write_text("no image\n")
    file = write(folder, [*lines[:2], line, *lines[2:]])
    fails(run("--data", file, "--output", tmp_path / "out"), message)
    assert not (tmp_path / "out").exists()


BAD_WORDS = [
    (["--data", "nowhere.jsonl"], "there is no file nowhere.jsonl"),
    (["--data", "demo", "--limit", "0"], "limit must be at least 1, got 0"),
    (["--data", "demo", "--limit", "6"], "at least 4 different images are needed"),
    (["--data", "demo", "--max-loss", "1"], "max_loss must be in [0, 1)"),
    (["--data", "demo", "--max-loss", "1%"], "--max-loss"),
    (["--data", "demo", "--confidence", "95"], "confidence must be in (0.5, 1), got 95"),
    (["--data", "demo", "--algorithms", "tom"], "Did you mean 'tome'?"),
    (["--data", "demo", "--algorithms", "tome,,pool"], "separated by single commas"),
    (["--data", "demo", "--algorithms", "tome,tome"], "recipe 'tome' is given twice"),
    (["--data", "demo", "--algorithms", "pitome:alhpa=2"], "Did you mean 'alpha'?"),
    (["--data", "demo", "--tokens", "0"], "tokens must be whole numbers of at least 1"),
    (["--data", "demo", "--tokens", "many"], "tokens must be whole numbers of at least 1"),
    (["--data", "demo", "--limit", "24", "--tokens", "999"], "token counts in 1..144"),
    (["--data", "demo", "--limit", "24", "--batch-size", "0"], "batch_size must be"),
    (["--data", "demo", "--max-new-tokens", "0"], "--max-new-tokens"),
    (["--data", "demo", "--output", __file__], "output must be a folder"),
    (["--data", "demo", "--limit", "24", "--load-4bit", "--load-8bit"], "only one of"),
    (["--data", "demo", "--resume", "--overwrite"], "give one of them"),
    (["--dta", "demo"], "No such option: --dta"),
    ([], "Missing option '--data'"),
]


@pytest.mark.parametrize(("words", "message"), BAD_WORDS, ids=str)
def test_bad_words_are_one_line(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    fails(run(*words), message)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_s_own_config_is_never_overwritten(tmp_path):
    MergeConfig(keep=0.5).save_pretrained(tmp_path)
    fails(demo_run(tmp_path), "already holds pitome_config.json")
    assert MergeConfig.from_pretrained(tmp_path).keep == 0.5


def test_a_missing_matplotlib_is_said_before_anything_is_measured(tmp_path, monkeypatch):
    hide(monkeypatch, "matplotlib")
    fails(demo_run(tmp_path / "out"), 'pip install ".[viz]"')
    assert not (tmp_path / "out").exists()
