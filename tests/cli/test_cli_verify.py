"""`pitome-vlm verify`: files, tables, and every kind of bad input."""

from __future__ import annotations

import json

import numpy as np
import pytest
from checkpoint import save_checkpoint
from PIL import Image
from typer.testing import CliRunner

from pitome_vlm import MergeConfig
from pitome_vlm.cli import app, verify_run
from pitome_vlm.demo import checkpoint_path, scene_image
from pitome_vlm.loading.models import load
from pitome_vlm.measure.spectral import Clusters, merge_changes, merge_clusters
from pitome_vlm.measure.spectral.study import Checks

FILES = ["report.md", "results.json", "spectral.png"]
SMALL = ["--seeds", "2", "--sigma", "0.1,0.01", "--sizes", "8/4/2", "--count", "2"]


def run(*words):
    return CliRunner().invoke(app, ["verify", *map(str, words)])


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify") / "below" / "results"
    result = run(*SMALL, "--keep", "0.25", "--output", folder)
    assert result.exit_code == 0, result.stderr
    return result, folder


def test_three_files_and_nothing_else(done):
    result, folder = done
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert all(str(folder / name) in result.stdout.replace("\n", "") for name in FILES)
    with Image.open(folder / "spectral.png") as image:
        assert image.format == "PNG"
        assert min(image.size) > 400
        assert len(image.convert("RGB").getcolors(2**24)) > 20


def test_results_are_those_of_the_library(done):
    values = json.loads((done[1] / "results.json").read_text())
    assert values["checks"]["passed"] is True
    assert values["checks"]["weyl_violations"] == 0
    # 1 size x 2 layouts x 3 ways to step x 2 noises x 3 algorithms
    assert len(values["synthetic"]) == 36
    for row in values["synthetic"]:
        clusters = Clusters(tuple(row["sizes"]), row["layout"], row["sigma"])
        for seed in range(2):
            options = {"steps": row["steps"], "ratio": row["ratio"], "seed": seed}
            expected = merge_clusters(clusters, row["algorithm"], **options)
            assert row["distance"][seed] == pytest.approx(expected.distance, rel=1e-5)
            assert row["weyl_bound"][seed] == pytest.approx(expected.bound, rel=1e-5)
            assert row["mixed"][seed] == pytest.approx(expected.mixed, rel=1e-5)
            assert row["a3_strictly_ordered"][seed] == expected.assumptions.strictly_ordered
    model, processor = load(checkpoint_path(), dtype="float32")
    images = [scene_image(number, "val") for number in (0, 1)]
    pixels = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    changes = merge_changes(model, pixels, {"tome": MergeConfig(keep=0.25, algorithm="tome")})
    rows = [row for row in values["features"] if row["algorithm"] == "tome"]
    for row, layer in zip(rows, changes["tome"].layers, strict=False):
        assert (row["layer"], row["n_tokens"]) == (layer.layer, layer.change.n_tokens)
        expected = layer.change.distance / layer.change.n_tokens
        assert row["distance_per_token"] == pytest.approx(expected.tolist(), rel=1e-3)
    assert rows[-1]["layer"] is None
    assert (rows[-1]["n_tokens"], rows[-1]["n_groups"]) == (144, 36)
    assert len(rows[-1]["distance_per_token_shuffled"]) == 2


def test_report_and_terminal_say_what_is_true_and_what_was_measured(done):
    result, folder = done
    report, shown = (folder / "report.md").read_text(), " ".join(result.stdout.split())
    for text in (" ".join(report.split()), shown):
        assert "with sum weights only" in text
        assert "only for striped layouts" in text
        assert '"PiToMe is always closer in spectrum than ToMe" is false' in text
        assert "Weyl bound: held in all" in text
        assert "8/4/2" in text
        assert "144 -> 36" in text
    for fact in ("hardware: ", "torch: ", "dtype: float32", "val split", "keys (pitome)"):
        assert fact in report
    assert "A2: a margin separates" in report
    assert "largest size ratio" in report


def test_results_are_not_overwritten_unasked(done):
    _, folder = done
    before = {name: (folder / name).read_bytes() for name in FILES}
    result = run(*SMALL, "--output", folder)
    fails_in_one_line(result, "already holds report.md, results.json, spectral.png")
    assert {name: (folder / name).read_bytes() for name in FILES} == before


def test_overwrite_replaces_all_of_an_earlier_run(tmp_path):
    for name in FILES:
        (tmp_path / name).write_text("old")
    (tmp_path / "notes.txt").write_text("mine")
    words = [*SMALL[:6], "--no-features", "--no-plot", "--output", tmp_path, "--overwrite"]
    result = run(*words, "--algorithms", "tome")
    assert result.exit_code == 0, result.stderr
    # The old plot would have contradicted the new numbers.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", *FILES[:2]]
    values = json.loads((tmp_path / "results.json").read_text())
    assert values["features"] == []
    assert {row["algorithm"] for row in values["synthetic"]} == {"tome"}
    assert "model" not in values["provenance"]
    assert "Real features\n" not in (tmp_path / "report.md").read_text()


def test_own_model_own_images_and_several_algorithms(tmp_path):
    model = save_checkpoint(tmp_path / "model")
    image = tmp_path / "image [one].png"
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(image)
    result = run(
        "--model", model, "-i", image, "--tokens", 50, "--algorithms", "pool, tome,tome",
        "--no-synthetic", "-o", tmp_path / "out",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    values = json.loads((tmp_path / "out" / "results.json").read_text())
    assert values["synthetic"] == []
    assert list(dict.fromkeys(row["algorithm"] for row in values["features"])) == ["pool", "tome"]
    whole = [row for row in values["features"] if row["layer"] is None]
    assert {(row["n_tokens"], row["n_groups"]) for row in whole} == {(144, 50)}
    assert values["provenance"]["images"] == "1 (files)"
    assert values["checks"]["partitions"] == len(values["features"])
    assert (tmp_path / "out" / "spectral.png").is_file()


def test_a_broken_bound_is_exit_code_1_and_still_written(tmp_path, monkeypatch):
    monkeypatch.setattr(verify_run, "check", lambda *measured: Checks(7, 2, 0.5, 0.5))
    result = run(*SMALL[:6], "--no-features", "--no-plot", "--output", tmp_path)
    assert result.exit_code == 1
    assert "Weyl bound: FAILED in 2 of 7 partitions" in result.stdout
    assert "Lemma 1 with sum weights: FAILED" in result.stdout
    assert json.loads((tmp_path / "results.json").read_text())["checks"]["passed"] is False


def fails_in_one_line(result, message: str) -> None:
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--algorithms", "pitmoe"], "Did you mean 'pitome'?"),
        (["--algorithms", "pitome,"], "separated by single commas"),
        (["--algorithms", "none"], "algorithm 'none' keeps all 144 visual tokens"),
        (["--sigma", "0.1,small"], "sigma must be numbers separated by commas, got '0.1,small'"),
        (["--sigma", "0"], "sigma must be in (0, 10], got 0.0"),
        (["--sigma", "nan"], "sigma must be in (0, 10], got nan"),
        (["--sizes", "8/4,x/2"], "sizes must be like 32/16/8,20/16/12, got '8/4,x/2'"),
        (["--sizes", "8"], "sizes must be at least two clusters"),
        (["--sizes", "8/0"], "at least one token each"),
        (["--seeds", "0"], "seeds must be at least 1, got 0"),
        (["--count", "0"], "count must be in 1..400"),
        (["--count", "401"], "count must be in 1..400"),
        (["--count", "2", "--image", "x.png"], "give either --image or --count"),
        (["--image", "nowhere.png"], "nowhere.png: no such file"),
        (["--image", __file__], "not an image"),
        (["--keep", "0"], "keep must be in (0, 1], got 0"),
        (["--keep", "1"], "keeps all 144 visual tokens"),
        (["--keep", "0.5", "--tokens", "9"], "exactly one of keep"),
        (["--tokens", "145"], "tokens must be in 1..144"),
        (["--model", "./nowhere"], "no such folder"),
        (["--no-features", "--no-synthetic"], "leave nothing to measure"),
        (["--output", __file__], "output must be a folder"),
        (["--wat"], "No such option"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_before_anything_is_written(words, message, tmp_path):
    output = [] if "--output" in words else ["--output", tmp_path / "out"]
    fails_in_one_line(run(*words, *output), message)
    assert list(tmp_path.iterdir()) == []


def test_algorithms_that_need_attention_are_named_and_left_out(monkeypatch, tmp_path):
    monkeypatch.setattr(verify_run, "can_merge", lambda name: name != "random")
    words = ["--no-features", "--no-plot", *SMALL[:6], "--output", tmp_path]
    result = run(*words, "--algorithms", "random,tome")
    assert result.exit_code == 0
    assert "measured on real features only: random" in result.stderr
    values = json.loads((tmp_path / "results.json").read_text())
    assert {row["algorithm"] for row in values["synthetic"]} == {"tome"}
    fails_in_one_line(run(*words, "--overwrite", "--algorithms", "random"), "give --no-synthetic")
