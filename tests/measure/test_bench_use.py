"""The benchmark in use: its command, its scripts, and the gate that merging saves time at all."""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from absent import hide
from typer.testing import CliRunner

import pitome_vlm
from pitome_vlm.cli import app

ROOT = Path(__file__).resolve().parents[2]
# Wrapped at keep=0.25 against unwrapped, the median of ratios of neighbouring runs. FLOPs say
# 0.50 and a quiet machine about 0.53; 0.75 leaves room for a noisy one and none for no speed-up.
LARGEST_RATIO = 0.75


# --- the command


def run(*words):
    return CliRunner().invoke(app, ["bench", *map(str, words)])


QUICK = ("--repeats", 1, "--warmup", 0, "--answer-tokens", 2, "--text-tokens", 8)


def test_a_model_that_does_not_fit_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr("pitome_vlm.measure.bench.shapes.free_bytes", lambda device: 2**20)
    result = run("--config", "llava-1.5-13b")
    assert result.exit_code == 2
    assert "49.7 GiB" in result.stderr


@pytest.mark.parametrize("beside", [("--layers", 1), ("--memory", 2)])
def test_trying_the_largest_batch_goes_with_neither_part_nor_other_memory(beside):
    result = run("--config", "tiny", "--max-batch", *beside, *QUICK)
    assert result.exit_code != 0
    assert "--max-batch" in result.stderr
    assert beside[0] in result.stderr


def test_command_shows_tables_that_fit_and_writes_files(tmp_path):
    files = {kind: tmp_path / "new" / f"b.{kind}" for kind in ("json", "png", "md")}
    options = ["--json", files["json"], "--plot", files["png"], "--report", files["md"]]
    result = run(
        *("--config", "tiny-next", "--layers", 1, "--algorithm", "pitome_plus,tome"),
        *("--keep", "0.5,0.25", "--batch", "1,2", "--image-size", "140x90", "--check-flops"),
        *("--memory", 0.5, *QUICK, *options),
    )
    assert result.exit_code == 0, result.stderr
    rows = [line for line in result.stdout.splitlines() if line.startswith(" pitome_plus keep")]
    assert sum(bool(re.search(r" \d+\.\d\dx", row)) for row in rows) == 8  # gains, whole depth
    assert len(rows) == 14  # three tables of two cases, one of budgets
    assert max(map(len, rows)) <= 100
    assert "…" not in result.stdout
    assert "1 of 2 language model layers" in result.stdout
    assert "FLOPs (2 per multiply-add" in result.stdout
    written = json.loads(files["json"].read_text())
    assert len(written["results"]) == 10
    assert written["depth"] == 2.0
    assert written["max_batch"]["none"]["measured"] is False
    assert all(file.stat().st_size > 1000 for file in files.values())
    last = result.stdout.rstrip().splitlines()[-1]
    assert last.startswith("tome keep=0.25, batch 2")


def test_command_times_a_checkpoint():
    result = run("--model", "demo", "--tokens", 36, *QUICK)
    assert result.exit_code == 0, result.stderr
    assert "tokens=36" in result.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--config", "llava-1.5-7"), "Did you mean 'llava-1.5-7b'"),
        (("--config", "tiny", "--keep", "x"), "--keep takes numbers"),
        (("--config", "tiny", "--keep", "0"), "keep"),
        (("--config", "tiny", "--keep", "1.5"), "keep"),
        (("--config", "tiny", "--tokens", "145"), "144"),
        (("--config", "tiny", "--algorithm", "pitme"), "pitome"),
        (("--config", "tiny", "--model", "demo"), "give one of"),
        ((), "give one of"),
        (("--model", "demo", "--layers", 1), "--layers belongs to --config"),
        (("--config", "tiny", "--layers", 0), "layers must be at least 1, got 0"),
        (("--config", "tiny", "--layers", 9), "layers must be at most 2, got 9"),
        (("--config", "tiny", "--load-4bit"), "--load-4bit quantises a checkpoint"),
        (("--config", "tiny", "--batch", "0"), "batch must be at least 1, got 0"),
        (("--config", "tiny", "--batch", "-1"), "batch must be at least 1, got -1"),
        (("--config", "tiny", "--batch", ","), "--batch takes numbers"),
        (("--config", "tiny", "--repeats", 0), "repeats must be at least 1"),
        (("--config", "tiny", "--answer-tokens", 1), "answer_tokens must be at least 2"),
        (("--config", "tiny", "--memory", 0), "memory must be above 0"),
        (("--config", "tiny", "--image-size", "12"), "WIDTHxHEIGHT"),
        (("--config", "tiny", "--plot", "x.docx"), "plot must end in one of"),
        (("--config", "tiny", "--json", "/proc/no/b.json"), "/proc/no"),
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
    target = tmp_path / "b.json"
    result = run("--config", "tiny", "--keep", 0.5, "--batch", "1,4,8", *QUICK, "--json", target)
    assert result.exit_code == 0, result.stderr
    assert "batch 4: out of memory for at least one budget" in result.stdout
    assert [row["batch"] for row in json.loads(target.read_text())["results"]] == [1, 1]


def test_a_first_batch_out_of_memory_is_one_line(monkeypatch):
    full_from(1, monkeypatch)
    result = run("--config", "tiny", "--keep", 0.5, *QUICK)
    assert result.exit_code == 2
    assert "try a smaller --batch" in result.stderr


def test_a_plot_without_matplotlib_is_refused_at_once(monkeypatch):
    hide(monkeypatch, "matplotlib")
    result = run("--config", "tiny", "--plot", "x.png")
    assert result.exit_code == 2
    assert 'pip install ".[viz]"' in result.stderr
    assert not Path("x.png").exists()


@pytest.mark.slow
def test_ctrl_c_shows_and_writes_what_there_is(tmp_path):
    target = tmp_path / "b.json"
    words = ["--config", "tiny", "--keep", "0.5", "--repeats", "100000", "--warmup", "0"]
    done = subprocess.Popen(
        [sys.executable, "-m", "pitome_vlm", "bench", *words, "--json", str(target)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what runs in the background with Ctrl-C ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert done.stderr is not None
    while "round 1 of" not in (line := done.stderr.readline()):
        assert line, "ended before the first round"
    time.sleep(0.5)
    done.send_signal(signal.SIGINT)
    out, err = done.communicate(timeout=60)
    assert done.returncode == 130, err
    assert "interrupted" in err
    assert "interrupted after" in out
    written = json.loads(target.read_text())
    assert len({row["repeats"] for row in written["results"]}) == 1


# --- the scripts


def script(*words, folder=None, code=0, **environment):
    paths = [str(ROOT), *([] if folder is None else [str(folder)])]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        env=variables | environment,
        cwd=ROOT,
    )
    assert done.returncode == code, done.stderr
    return done.stdout


@pytest.mark.slow
def test_peers_script_goes_on_where_it_stopped(tmp_path):
    words = [sys.executable, "-m", "scripts.speed.peers", "--shape", "tiny", "--layers", 1]
    words += ["--tokens", "36", "--answer", 2, "--threads", 1, "--out", tmp_path / "peers"]
    script(*words, "--repeats", 1)
    assert "1 rounds so far" in script(*words, "--repeats", 2)
    written = json.loads((tmp_path / "peers.json").read_text())
    assert [row["repeats"] for row in written["results"]] == [2] * 7
    assert {row["visual_tokens"] for row in written["results"][1:]} == {36}
    table = (tmp_path / "peers.md").read_text()
    assert table.count("| 36 |") == 6
    assert "1 of 2 language model layers were built" in table


@pytest.mark.slow
def test_gpu_script_needs_neither_terminal_nor_plot_libraries(tmp_path):
    missing = ("rich", "typer", "matplotlib", "bitsandbytes")
    lines = ["import sys", *(f"sys.modules[{name!r}] = None" for name in missing)]
    (tmp_path / "sitecustomize.py").write_text("\n".join(lines))
    out = tmp_path / "gpu"
    said = script(
        *("bash", "scripts/speed/gpu_bench.sh"),
        *("--repeats", "1", "--batches", "1", "--tokens", "36"),
        folder=tmp_path,
        DEVICE="cpu",
        OUT=str(out),
        PYTHON=sys.executable,
    )
    assert "bitsandbytes is missing" in said
    report = (out / "report.md").read_text()
    for title in ("Against the CPU", "## tiny", "merge's share", "attention", "Prop", "## nf4"):
        assert title in report
    assert "failed" not in report
    for way in ("plain", "mask", "channel", "flex"):
        assert re.search(rf"\| 145 \| {way} \| \d", report)
    assert {one.name for one in out.glob("*.json")} == {
        *("correctness.json", "tiny.json", "share-tiny.json", "attention-tiny.json"),
        "proportional.json",
    }
    assert all(all(one["same"]) for one in json.loads((out / "correctness.json").read_text()))


@pytest.mark.slow
def test_gpu_script_goes_on_behind_a_step_that_fails(tmp_path):
    script(
        *(sys.executable, "-m", "scripts.speed.gpu_bench", "--device", "cpu", "--dtype", "float32"),
        *("--shapes", "tiny,no-such-shape", "--exact", "tiny", "--tokens", "36"),
        *("--batches", "1", "--repeats", "1", "--attention", "sdpa", "--out", tmp_path),
        code=1,
    )
    report = (tmp_path / "report.md").read_text()
    for title in ("## tiny", "## no-such-shape", "## Proportional attention", "nf4"):
        assert title in report
    assert "Failed: ValueError" in report
    assert "unknown shape 'no-such-shape'" in report.replace('"', "'")
    assert (tmp_path / "tiny.json").is_file()


@pytest.mark.slow
def test_gpu_script_stops_in_time_and_writes_what_it_has(tmp_path):
    said = script(
        *(sys.executable, "-m", "scripts.speed.gpu_bench", "--device", "cpu", "--dtype", "float32"),
        *("--shapes", "tiny", "--exact", "tiny", "--seconds", "1", "--out", tmp_path),
    )
    assert "Left out" in said
    assert "Against the CPU" in (tmp_path / "report.md").read_text()


# --- the gate


@pytest.mark.slow
def test_wrapped_tower_is_faster():
    """A quarter of the tokens takes at most LARGEST_RATIO of the time, in one run, in turns."""
    ratios = tower_ratios(keep=0.25)
    assert statistics.median(ratios) < LARGEST_RATIO, ratios


@torch.no_grad()
def tower_ratios(keep, rounds=5):
    """Wrapped over unwrapped time of neighbouring runs of one tower of 577 tokens."""
    torch.manual_seed(0)
    model, times = wide_model(), []
    pixels = torch.randn(1, 3, 336, 336)
    for _ in range(rounds + 1):
        start = time.perf_counter()
        model.model.get_image_features(pixel_values=pixels)
        middle = time.perf_counter()
        with pitome_vlm.wrapped(model, keep=keep, algorithm="pitome"):
            between = time.perf_counter()
            pitome_vlm.encode_images(model, pixels)
            end = time.perf_counter()
        times.append((end - between) / (middle - start))
    return times[1:]


def wide_model():
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    size = {"num_hidden_layers": 6, "num_attention_heads": 12, "hidden_size": 768}
    vision = CLIPVisionConfig(**size, intermediate_size=3072, image_size=336, patch_size=14)
    text = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=99)
    return LlavaForConditionalGeneration(config).eval()
