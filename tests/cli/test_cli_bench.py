"""`pitome-vlm bench`: tables and files, memory that runs out, Ctrl-C, every kind of bad input."""

from __future__ import annotations

import json
import re
import signal

import cli_runner
import pytest
import torch
from absent import hide

from pitome_vlm.cli import bench_run

FILES = ["bench.png", "report.md", "results.json"]


def run(*words):
    return cli_runner.run("bench", *words)


QUICK = ("--repeats", 1, "--warmup", 0, "--answer-tokens", 2, "--text-tokens", 8)


def test_a_model_that_does_not_fit_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr("pitome_vlm.measure.bench.shapes.free_bytes", lambda device: 2**20)
    result = run("--config", "llava-1.5-13b")
    assert result.exit_code == 2
    assert "49.7 GiB" in result.stderr


@pytest.mark.parametrize("other", [("--layers", 1), ("--memory", 2)])
def test_trying_the_largest_batch_goes_with_neither_part_nor_other_memory(other):
    result = run("--config", "tiny", "--max-batch", *other, *QUICK)
    assert result.exit_code != 0
    assert "--max-batch" in result.stderr
    assert other[0] in result.stderr


@pytest.mark.slow
def test_command_shows_tables_and_writes_files(tmp_path):
    folder = tmp_path / "new"
    result = run(
        *("--config", "tiny-next", "--layers", 1, "--algorithms", "pitome_plus,tome"),
        *("--keep", "0.5,0.25", "--batch", "1,2", "--image-size", "140x90", "--check-flops"),
        *("--memory", 0.5, *QUICK, "--output", folder),
    )
    assert result.exit_code == 0, result.stderr
    rows = [line for line in result.stdout.splitlines() if line.startswith("pitome_plus keep")]
    assert sum(bool(re.search(r" \d+\.\d\dx", row)) for row in rows) == 8  # gains, whole depth
    assert len(rows) == 14  # three tables of two cases, one of budgets
    assert "…" not in result.stdout
    assert "1 of 2 language model layers" in result.stdout
    assert "FLOPs (2 per multiply-add" in result.stdout
    written = json.loads((folder / "results.json").read_text())
    assert len(written["results"]) == 10
    assert written["depth"] == 2.0
    assert written["max_batch"]["none"]["measured"] is False
    assert sorted(file.name for file in folder.iterdir()) == FILES
    assert all(file.stat().st_size > 1000 for file in folder.iterdir())
    # The verdict comes first, so that nobody has to look for it among the tables.
    found = [line for line in result.stdout.splitlines() if line.startswith("- ")][:8]
    assert result.stdout.startswith("- pitome_plus keep=0.5, batch 1")
    assert found[-1].startswith("- tome keep=0.25, batch 2")
    *_, first, second, third = result.stdout.rstrip().splitlines()
    assert sorted([first, second, third]) == [str(folder / name) for name in FILES]


def test_results_are_not_overwritten_unasked(tmp_path):
    for name in FILES:
        (tmp_path / name).write_text("old")
    words = ["--config", "tiny", "--keep", 0.5, *QUICK, "--output", tmp_path]
    result = run(*words)
    assert result.exit_code == 2
    assert "already holds" in result.stderr
    assert "--overwrite" in result.stderr
    result = run(*words, "--overwrite", "--no-plot")
    assert result.exit_code == 0, result.stderr
    # The old plot would have contradicted the new numbers.
    assert sorted(file.name for file in tmp_path.iterdir()) == FILES[1:]
    assert "old" not in {file.read_text() for file in tmp_path.iterdir()}


def test_a_checkpoint_is_timed():
    result = run("--model", "demo", "--tokens", 36, *QUICK)
    assert result.exit_code == 0, result.stderr
    assert "tokens=36" in result.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--config", "llava-1.5-7"), "Did you mean 'llava-1.5-7b'"),
        (("--config", "tiny", "--keep", "x"), "keep must be numbers separated by commas"),
        (("--config", "tiny", "--keep", "0"), "keep"),
        (("--config", "tiny", "--keep", "1.5"), "keep"),
        (("--config", "tiny", "--tokens", "145"), "144"),
        (("--config", "tiny", "--algorithms", "pitme"), "pitome"),
        (("--config", "tiny", "--model", "demo"), "give either --model PATH or --config NAME"),
        ((), "give either --model PATH or --config NAME"),
        (("--model", "demo", "--layers", 1), "--layers needs --config"),
        (("--config", "tiny", "--layers", 0), "layers must be at least 1, got 0"),
        (("--config", "tiny", "--layers", 9), "layers must be at most 2, got 9"),
        (("--config", "tiny", "--load-4bit"), "quantise a checkpoint"),
        (("--config", "tiny", "--batch", "0"), "batch must be whole numbers of at least 1"),
        (("--config", "tiny", "--batch", "-1"), "batch must be whole numbers of at least 1"),
        (("--config", "tiny", "--batch", ","), "batch must be separated by single commas"),
        (("--config", "tiny", "--repeats", 0), "repeats must be at least 1"),
        (("--config", "tiny", "--answer-tokens", 1), "answer_tokens must be at least 2"),
        (("--config", "tiny", "--memory", 0), "memory must be above 0"),
        (("--config", "tiny", "--image-size", "12"), "WIDTHxHEIGHT"),
        (("--config", "tiny", "--output", "/proc/no"), "/proc/no"),
        (("--config", "tiny", "--output", __file__), "output must be a folder"),
        (("--config", "tiny", "--dtype", "int3"), "int3"),
    ],
)
def test_wrong_options_are_one_line_before_anything_is_measured(words, message):
    result = run(*words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "round" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1


def test_a_checkpoint_is_timed_and_its_formulas_hold():
    words = ["--keep", 0.25, "--answer-tokens", 2, "--check-flops", "--threads", 1, "--json"]
    result = run("--model", "demo", "--dtype", "float32", *words, *QUICK)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    counted = [note for note in found["notes"] if note.startswith("FLOPs counted by PyTorch")]
    assert [re.search(r"formula, (\S+): ", note)[1] for note in counted] == ["none", "keep=0.25"]
    assert all(0.99 < float(note.rsplit(" ", 1)[1]) < 1.01 for note in counted)
    assert [row["visual_tokens"] for row in found["results"]] == [144, 36]
    assert found["setup"]["threads"] == 1


def full_from(batch, monkeypatch):
    """Memory that is too small for so many prompts."""
    from pitome_vlm.measure.bench import measurement

    answer = measurement.answer

    def bounded(model, inputs, tokens):
        if len(inputs["input_ids"]) >= batch:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return answer(model, inputs, tokens)

    monkeypatch.setattr(measurement, "answer", bounded)


def test_a_batch_out_of_memory_takes_nothing_from_those_that_fit(monkeypatch, tmp_path):
    full_from(4, monkeypatch)
    words = ["--config", "tiny", "--keep", 0.5, "--batch", "1,4,8", *QUICK]
    result = run(*words, "--output", tmp_path, "--no-plot")
    assert result.exit_code == 0, result.stderr
    assert "batch 4: out of memory for at least one budget" in result.stdout
    written = json.loads((tmp_path / "results.json").read_text())
    assert [row["batch"] for row in written["results"]] == [1, 1]


def test_a_first_batch_out_of_memory_is_one_line(monkeypatch):
    full_from(1, monkeypatch)
    result = run("--config", "tiny", "--keep", 0.5, *QUICK)
    assert result.exit_code == 2
    assert "try a smaller --batch" in result.stderr


def test_a_plot_without_matplotlib_is_refused_at_once(monkeypatch, tmp_path):
    hide(monkeypatch, "matplotlib")
    result = run("--config", "tiny", "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert 'pip install ".[viz]"' in result.stderr
    assert "--no-plot" in result.stderr
    assert not (tmp_path / "out").exists()


def test_ctrl_c_shows_and_writes_what_there_is(tmp_path, monkeypatch):
    say = bench_run.say

    def interrupt_the_first_round(text):
        say(text)
        if "round 1 of" in text:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(bench_run, "say", interrupt_the_first_round)
    monkeypatch.setattr(bench_run, "SECONDS_BETWEEN_LINES", 0)
    words = ["--config", "tiny", "--keep", "0.5", "--repeats", "100000", "--warmup", "0"]
    result = run(*words, "--output", tmp_path, "--no-plot")
    assert result.exit_code == 130
    assert "interrupted" in result.stderr
    assert "interrupted after 1 of 100000" in result.stdout
    written = json.loads((tmp_path / "results.json").read_text())
    assert {row["repeats"] for row in written["results"]} == {1}
