"""`pitome-vlm demo`: the whole comparison, and the sample it asks."""

from __future__ import annotations

import html
import re
from collections import Counter

import pytest
from cli_runner import fails_in_one_line, run
from PIL import Image

from pitome_vlm.cli import demo_run
from pitome_vlm.cli.demo_run import balanced, choose_scene, held_out


@pytest.mark.slow
def test_demo_compares_all_methods_and_writes_a_page(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_run, "TIMED_RUNS", 2)
    result = run("demo", "--questions", 9, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    rows = re.findall(r"(no merging|PiToMe\+|ToMe|random|pool) +(\d+) +[\d.]+ %", result.stdout)
    merged = [
        (name, n) for n in ("72", "36", "16") for name in ("PiToMe+", "ToMe", "random", "pool")
    ]
    assert rows == [("no merging", "144"), *merged]
    assert "A small sample" in result.stdout
    assert "KV (float32)" in result.stdout
    assert "eval/results/demo" in result.stdout
    for name in ("scene.png", "overlay.png", "report.html"):
        assert f"{tmp_path / 'out' / name}\n" in result.stdout
    assert Image.open(tmp_path / "out" / "overlay.png").width > 5 * 300
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("<img") == 6
    assert page.count("<tr") == 2 + 13 + page.count("?</td>")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """One budget and one method of what the slow test looks at."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_run, "TIMED_RUNS", 1)
        patch.setattr(demo_run, "KEEPS", (0.25,))
        patch.setattr(demo_run, "TITLES", {"pitome_plus": "PiToMe+"})
        return folder, run("demo", "--questions", 9, "--output", folder)


def test_demo_shows_one_scene_and_writes_its_page(small):
    folder, result = small
    assert result.exit_code == 0, result.stderr
    rows = re.findall(r"(no merging|PiToMe\+) +(\d+) +([\d.]+) % ", result.stdout)
    assert [row[:2] for row in rows] == [("no merging", "144"), ("PiToMe+", "36")]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert all(f">{accuracy} %</td>" in page for _, _, accuracy in rows)
    scene = choose_scene(held_out(), 0)
    assert all(html.escape(sample.question) in page for sample in scene)
    marks = sum(line.count("✓") + line.count("✗") for line in result.stdout.splitlines())
    assert marks == page.count("✓") + page.count("✗") == 2 * len(scene)
    assert Image.open(folder / "scene.png").size == (480, 480)


def test_an_earlier_demo_is_not_replaced_unasked(tmp_path):
    (tmp_path / "overlay.png").write_text("old")
    result = run("demo", "--output", tmp_path)
    fails_in_one_line(result, f"{tmp_path} already holds overlay.png")
    assert "--overwrite" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["overlay.png"]


def test_the_sample_is_balanced_and_depends_on_the_seed_only():
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
