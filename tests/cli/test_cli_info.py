"""`pitome-vlm info`: counts and costs without weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from cli_runner import fails_in_one_line, run

from pitome_vlm.merge import algorithms
from pitome_vlm.merge.config import MergeConfig


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
    result = run("info", "--model", "demo", "--json")
    values = json.loads(result.stdout)
    assert (values["tokens_in"], values["tokens_out"]) == (144, 36)
    assert "keep=0.25 (default)" in result.stderr


def test_info_describes_a_preset():
    result = run("info", "--model", "demo", "--preset", "paper", "--tokens", 36)
    assert result.exit_code == 0, result.stderr
    assert "36" in result.stdout


def test_all_algorithms_are_listed():
    text = run("info", "--list-algorithms").stdout
    assert all(f"\n{name} " in text for name in algorithms.available())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--keep", "2"], "keep must be in (0, 1]"),
        (["--keep", "0.5", "--algorithm", "tom"], "Did you mean 'tome'?"),
        (["--image-size", "1024"], "image-size must be WIDTHxHEIGHT"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(words, message, checkpoint):
    fails_in_one_line(run("info", "--model", checkpoint, *words), message)
