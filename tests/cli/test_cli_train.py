"""`pitome-vlm train`: every kind of bad input, Ctrl-C, and an adapter that other commands take."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from cli_runner import fails_in_one_line
from training_data import records, write_lines
from typer.testing import CliRunner

from pitome_vlm.cli import app
from pitome_vlm.cli.train_run import load_trainable
from pitome_vlm.merge.config import MergeConfig
from pitome_vlm.training import MergingTrainer
from pitome_vlm.wrapping.wrap import merge_config


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return write_lines(folder / "train.jsonl", records(folder, 12))


def cli(*words):
    return CliRunner().invoke(app, ["train", *map(str, words)])


class TestCommand:
    @pytest.mark.slow
    def test_train_and_ask(self, checkpoint, data, tmp_path):
        done = cli(
            *("--model", checkpoint, "--data", data, "--val-fraction", 0.25, "--load-4bit"),
            *("-o", tmp_path / "out", "--tokens", 16, "--max-steps", 2, "--rank", 4),
            *("--budgets", "8,0.5", "--training-args", "weight_decay=0.01,bf16=False"),
        )
        assert done.exit_code == 0, done.output
        assert done.stdout.strip() == str(tmp_path / "out")
        assert "144 -> 16 visual tokens" in done.stderr
        assert "answers right: " in done.stderr
        run = json.loads((tmp_path / "out" / "training_run.json").read_text())
        assert run["arguments"]["weight_decay"] == 0.01
        assert run["budgets"] == [8, 0.5]
        image = data.parent / "0.png"
        words = ["ask", "-m", tmp_path / "out", "-i", image, "-v", "what is it ?"]
        asked = CliRunner().invoke(app, [str(word) for word in words])
        assert asked.exit_code == 0, asked.output
        assert "144 -> 16 visual tokens" in asked.stderr
        again = cli(
            *("--model", tmp_path / "out", "--data", data, "-o", tmp_path / "more"),
            *("--max-steps", 1),
        )
        assert again.exit_code == 0, again.output
        record = json.loads((tmp_path / "more" / "pitome_adapter.json").read_text())
        assert record["quantization"]["load_in_4bit"]
        assert record["training"]["lora"] == "continued"
        words = ["--model", checkpoint, "--data", data, "-o", tmp_path / "more", "--max-steps", 1]
        refused = cli(*words)
        assert refused.exit_code == 2
        assert "--overwrite" in refused.stderr
        replaced = cli(*words, "--overwrite", "--tokens", 9)
        assert replaced.exit_code == 0, replaced.output
        saved = json.loads((tmp_path / "more" / "pitome_config.json").read_text())
        assert saved["tokens"] == 9
        twice = cli(
            *("--model", tmp_path / "out", "--data", data, "-o", tmp_path / "x", "--rank", 8)
        )
        assert twice.exit_code == 2
        assert "already has an adapter" in twice.stderr

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["--tokens", 16, "--keep", 0.5], "exactly one"),
            (["--tokens", 1000], "1000"),
            (["--tokens", 16, "--budgets", "a"], "budgets"),
            (["--tokens", 16, "--training-args", "x"], "NAME=VALUE"),
            (["--tokens", 16, "--training-args", "lerning_rate=1"], "learning_rate"),
            (["--tokens", 16, "--alpha", "-1"], "alpha"),
            (["--tokens", 16, "--base", "x"], "base"),
            (["--tokens", 16, "--image-folder", "nowhere"], "nowhere"),
            (["--tokens", 16, "--load-4bit", "--load-8bit"], "only one of --load-4bit"),
            (["--tokens", 16, "--algorithm", "tme"], "tome"),
            (["--resume", "--overwrite"], "give one of them"),
        ],
        ids=str,
    )
    def test_errors_are_one_line_and_code_2(self, checkpoint, data, tmp_path, words, said):
        given = ["--model", checkpoint, "--data", data, "-o", tmp_path / "out", *words]
        done = cli(*given)
        assert done.exit_code == 2
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("error: ")
        assert said in last
        assert "Traceback" not in done.output
        assert not (tmp_path / "out").exists()

    def test_without_a_budget_a_quarter_is_kept_and_that_is_said(self, checkpoint, capsys):
        model, _ = load_trainable(str(checkpoint), {}, device="cpu")
        assert merge_config(model) == MergeConfig(keep=0.25)
        assert "keep=0.25 (default), pitome_plus: 144 -> 36" in capsys.readouterr().err

    def test_a_bad_line_is_named_before_the_model_is_loaded(self, data, tmp_path):
        rows = records(data.parent, 2)
        rows[1]["image"] = "gone.png"
        bad = write_lines(data.parent / "bad.jsonl", rows)
        done = cli("--model", "no/such", "--data", bad, "-o", tmp_path / "out", "--tokens", 16)
        assert done.exit_code == 2
        assert "bad.jsonl line 2: no such image file" in done.stderr

    def test_missing_data_are_noticed_before_torch_is_imported(self, data, tmp_path):
        code = (
            "import sys; from pitome_vlm.cli import app\n"
            "try: app(sys.argv[1:])\n"
            "finally: print('torch' in sys.modules)"
        )
        for words, said in {
            "no file": (["--data", tmp_path / "gone.jsonl"], "error: --data: no such file: "),
            "no name": (["--data", "./gone"], "error: --data: no such file: ./gone"),
            "val": (["--data", data, "--val-data", "x.json"], "error: --val-data: no such file"),
            "images": (["--data", data, "--image-folder", "nowhere"], "nowhere is not a folder"),
            "both": (
                ["--data", data, "--val-data", data, "--val-fraction", 0.5],
                "only one of --val-data and --val-fraction",
            ),
            "share": (["--data", data, "--val-fraction", 2], "--val-fraction must be in (0, 1)"),
        }.values():
            given = ["train", "--model", "no/such", "-o", tmp_path / "out", *words]
            given += ["--tokens", 16]
            done = cli(*given[1:])
            fails_in_one_line(done, said)
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, given)], capture_output=True, text=True
        )
        assert done.stdout.strip() == "False"
        assert not (tmp_path / "out").exists()

    def test_data_that_teach_nothing_are_refused_or_said(self, checkpoint, data, tmp_path):
        given = ("--model", checkpoint, "--data", data, "-o", tmp_path / "out", "--tokens", 16)
        done = cli(*given, "--max-length", 148)
        assert done.exit_code == 2
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("error: train.jsonl: max_length=148 cuts every answer off in all 12")
        assert not (tmp_path / "out").exists()

    def test_ctrl_c_is_interrupted_130(self, checkpoint, data, tmp_path, monkeypatch):
        def stop(*args, **kwargs):
            raise KeyboardInterrupt

        monkeypatch.setattr(MergingTrainer, "training_step", stop)
        done = cli(*("--model", checkpoint, "--data", data, "-o", tmp_path / "out", "--tokens", 16))
        assert done.exit_code == 130
        assert done.stderr.strip().splitlines()[-1] == "interrupted"
        assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
