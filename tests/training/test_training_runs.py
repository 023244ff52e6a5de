"""Whole runs: killed and resumed, in two processes, in folders that are something else."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoint import edit_weights, save_checkpoint
from safetensors.torch import load_file
from training_data import louder, records, write_lines

import pitome_vlm
from pitome_vlm.training import DataError, LoraOptions, train
from pitome_vlm.training.run_files import RunFolder

STEPS = 8
OPTIONS = {
    "lora": LoraOptions(rank=4, dropout=0.1),
    "max_steps": STEPS,
    "learning_rate": 5e-3,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "save_steps": 2,
    "budgets": [8, 36],
    # Sums in another order differ by more than the tolerances in half precision.
    "bf16": False,
}
WORDS = (
    *("--tokens", "16", "--max-steps", str(STEPS), "--lr", "5e-3", "--rank", "4", "--alpha", "64"),
    *("--dropout", "0.1", "--budgets", "8,36", "--dtype", "float32", "--device", "cpu"),
)
FIELDS = "logging_steps=1,save_steps=2,bf16=false"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkpoint and data, and a run of one process from beginning to end."""
    folder = tmp_path_factory.mktemp("runs")
    save_checkpoint(folder / "model")
    edit_weights(folder / "model", louder)
    write_lines(folder / "train.jsonl", records(folder, 12))
    whole = run(folder, folder / "whole")
    return folder, whole


def run(folder: Path, output: Path, **options):
    model, processor = pitome_vlm.load(folder / "model", tokens=16, dtype="float32")
    return train(model, processor, folder / "train.jsonl", output, **(OPTIONS | options))


def losses(folder: Path) -> list[float]:
    state = json.loads((folder / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def command(folder: Path, output: Path, batch: int, *words: str) -> list[str]:
    return [
        *("-m", "pitome_vlm", "train", "--model", str(folder / "model")),
        *("--data", str(folder / "train.jsonl"), "-o", str(output), "--batch-size", str(batch)),
        *(*WORDS, "--training-args", FIELDS, *words),
    ]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}


def same_adapter(one: Path, other: Path, **tolerance) -> None:
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], msg=name, **tolerance)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_end(place, tmp_path):
    folder, whole = place
    process = subprocess.Popen(
        [sys.executable, *command(folder, tmp_path / "out", 4)],
        env=environment(),
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 240
    # A state that exists may not be written yet, so a complete checkpoint is waited for.
    while RunFolder(tmp_path / "out").last_checkpoint() is None:
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
    # A checkpoint that was being written when the process died.
    broken = tmp_path / "out" / "checkpoint-99"
    broken.mkdir()
    (broken / "trainer_state.json").write_text('{"global_st')
    result = run(folder, tmp_path / "out", lora=LoraOptions(4, 64.0, 0.1), resume=True)
    assert result.steps == STEPS
    assert losses(tmp_path / "out") == losses(whole.output_dir)
    same_adapter(tmp_path / "out", whole.output_dir, rtol=0, atol=0)


@pytest.mark.slow
def test_two_processes_follow_one_with_the_same_global_batch(place, tmp_path):
    folder, whole = place
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Dropout draws differ between processes, so it is off here and in the run of one.
    single = run(folder, tmp_path / "one", lora=LoraOptions(rank=4, alpha=64.0))
    launch = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"),
        *("--master_addr", "127.0.0.1", "--master_port", str(port)),
        *command(folder, tmp_path / "two", 2, "--dropout", "0"),
    ]
    done = subprocess.run(launch, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "two")]
    assert losses(tmp_path / "two") == pytest.approx(losses(single.output_dir), rel=1e-4)
    same_adapter(tmp_path / "two", single.output_dir, rtol=1e-2, atol=1e-4)
    settings = json.loads((tmp_path / "two" / "training_run.json").read_text())
    assert settings["arguments"]["batch"] == 4
    assert whole.steps == STEPS


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"learning_rate": 1e-3}, "arguments.learning_rate was 0.005, is 0.001"),
        ({"lora": LoraOptions(rank=8)}, "lora was 'rank 4"),
        ({"budgets": [8]}, "budgets"),
        ({"per_device_train_batch_size": 2}, "arguments.batch was 4, is 2"),
        ({"val_fraction": 0.25}, "data.train"),
    ],
    ids=str,
)
def test_another_run_is_not_resumed_in_the_folder(place, tmp_path, change, said):
    folder, whole = place
    (tmp_path / "out").mkdir()
    settings = (whole.output_dir / "training_run.json").read_text()
    (tmp_path / "out" / "training_run.json").write_text(settings)
    with pytest.raises(ValueError, match="holds another run") as caught:
        run(folder, tmp_path / "out", resume=True, **change)
    assert said in str(caught.value)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["training_run.json"]


def test_other_data_do_not_resume(place, tmp_path):
    folder, _ = place
    rows = records(folder, 12)
    rows[0]["conversations"][1]["value"] = "green"
    write_lines(folder / "other.jsonl", rows)
    model, processor = pitome_vlm.load(folder / "model", tokens=16, dtype="float32")
    settings = (folder / "whole" / "training_run.json").read_text()
    (tmp_path / "training_run.json").write_text(settings)
    with pytest.raises(ValueError, match=r"data\.train"):
        train(model, processor, folder / "other.jsonl", tmp_path, resume=True, **OPTIONS)


def test_resuming_nothing_begins(place, tmp_path):
    folder, _ = place
    result = run(folder, tmp_path / "new", resume=True, max_steps=1, budgets=())
    assert result.steps == 1


def test_an_image_that_breaks_during_training_is_named(place, tmp_path):
    folder, _ = place
    rows = records(folder, 3)
    (tmp_path / "late.png").write_bytes(b"not an image")
    rows[1]["image"] = str(tmp_path / "late.png")
    file = write_lines(tmp_path / "train.jsonl", rows)
    model, processor = pitome_vlm.load(folder / "model", tokens=16, dtype="float32")
    with pytest.raises(DataError, match=r"train\.jsonl line 2: .*late\.png"):
        train(model, processor, file, tmp_path / "out", image_folder=folder, max_steps=3)
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_the_last_complete_checkpoint_is_found(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.last_checkpoint() is None
    for step, state in ((2, "{}"), (10, "{}"), (30, None), (40, "{"), ("x", "{}")):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert folder.last_checkpoint() == tmp_path / "checkpoint-10"


def test_checkpoints_are_adapters_that_load(place):
    _, whole = place
    last = RunFolder(whole.output_dir).last_checkpoint()
    model, _ = pitome_vlm.load(last)
    assert pitome_vlm.describe(model).tokens_out == 16
