"""`pitome-vlm demo`: the whole comparison, and the sample it asks."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from cli_runner import fails_in_one_line, run
from PIL import Image

from pitome_vlm.cli import demo_run
from pitome_vlm.cli.demo_run import balanced, chosen_scene, draw_scene, held_out
from pitome_vlm.demo import Sample
from pitome_vlm.demo.shown import Shown, shown
from scripts.demo.scene import choose

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_demo_compares_all_methods_and_writes_a_page(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_run, "TIMED_RUNS", 2)
    result = run("demo", "--questions", 9, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    rows = re.findall(r"(no merging|pitome_plus|tome|paper|random) +(\d+) +[\d.]+ %", result.stdout)
    names = ("pitome_plus", "tome", "paper", "random")
    assert rows == [
        ("no merging", "144"),
        *((name, n) for n in ("72", "36", "18") for name in names),
    ]
    assert re.search(r"batch 1 +faster +batch 8 +faster", result.stdout)
    assert "A small sample" in result.stdout
    assert "KV (float32)" in result.stdout
    assert "eval/results/demo" in result.stdout
    for name in ("scene.png", "scene-compared.png", "report.html"):
        assert f"{tmp_path / 'out' / name}\n" in result.stdout
    # The README's image, byte for byte, and what it says of it.
    for name in ("scene.png", "scene-compared.png"):
        drawn, stored = tmp_path / "out" / name, ROOT / "docs/assets" / name
        assert drawn.read_bytes() == stored.read_bytes(), "run `python -m scripts.demo.scene`"
    (line,) = [line for line in result.stdout.splitlines() if line.startswith(shown().question)]
    assert line.split()[-9:] == ["three", "✓", "three", "✓", "three", "✗", "four", "✗", "six"]
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("<img") == 5
    assert page.count("<tr") == 2 + 13 + page.count("?</td>")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """One budget and one method of what the slow test looks at."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_run, "TIMED_RUNS", 1)
        patch.setattr(demo_run, "KEEPS", (0.25,))
        for name in ("METHODS", "SCENE_METHODS"):
            patch.setattr(demo_run, name, ("pitome_plus",))
        return folder, run("demo", "--questions", 9, "--seed", 0, "--output", folder)


def test_demo_shows_one_scene_and_writes_its_page(small):
    folder, result = small
    assert result.exit_code == 0, result.stderr
    rows = re.findall(r"(no merging|pitome_plus) +(\d+) +([\d.]+) % ", result.stdout)
    assert [row[:2] for row in rows] == [("no merging", "144"), ("pitome_plus", "36")]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert all(f">{accuracy} %</td>" in page for _, _, accuracy in rows)
    scene = draw_scene(held_out(), 0)
    assert all(html.escape(sample.question) in page for sample in scene)
    marks = sum(line.count("✓") + line.count("✗") for line in result.stdout.splitlines())
    assert marks == page.count("✓") + page.count("✗") == 2 * len(scene)
    assert Image.open(folder / "scene.png").size == (480, 480)


def test_an_earlier_demo_is_not_replaced_unasked(tmp_path):
    (tmp_path / "scene.png").write_text("old")
    result = run("demo", "--output", tmp_path)
    fails_in_one_line(result, f"{tmp_path} already holds scene.png")
    assert "--overwrite" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["scene.png"]


def test_the_sample_is_balanced_and_depends_on_the_seed_only():
    samples = held_out()
    chosen = balanced(samples, 30, seed=3)
    counts = Counter(sample.question_type for sample in chosen)
    assert len(chosen) == len(set(chosen)) == 30
    assert max(counts.values()) - min(counts.values()) <= 1
    assert len(counts) == 9
    assert chosen == balanced(samples, 30, seed=3) != balanced(samples, 30, seed=4)
    scene = draw_scene(samples, 0)
    assert len(scene) >= 5
    assert len({sample.scene_id for sample in scene}) == 1


def test_the_first_line_does_not_wait_for_torch(tmp_path):
    script = (
        "import importlib, sys\n"
        "from pitome_vlm.cli import app\n"
        "module = importlib.import_module('pitome_vlm.cli.demo')\n"
        "heavy = {'torch', 'transformers'}\n"
        "module.write = lambda text: sys.exit(text + str(heavy & set(sys.modules)))\n"
        f"app(['demo', '--output', {str(tmp_path)!r}])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr.startswith("A tiny LLaVA"), done.stderr
    assert done.stderr.endswith("set()\n")


def test_the_stored_scene_is_one_of_val_that_methods_answer_differently():
    """What the rule of scripts/demo/scene.py looks at, for the scene that it chose."""
    scene = chosen_scene(None)
    assert (scene.split, scene.number) == ("val", shown().scene_id)
    assert scene.samples[0].kind in demo_run.SHOWN_KINDS
    right = np.stack([o.correct for o in demo_run.load_demo().answers(scene)])
    assert right[:2].all()
    assert not right[2:, scene.question].any()
    chosen = choose(list(scene.samples), right)
    assert chosen == shown()


def test_the_rule_prefers_what_others_get_wrong_then_the_lowest_number():
    samples = [
        Sample(number, "scattered", kind, f"{number} {kind}?", "no")
        for number in (1, 2, 3, 4)
        for kind in ("size", "count")
    ]
    right = np.ones((4, 8), bool)
    right[0, 6] = False  # scene 4: the unmerged model is wrong
    right[2:, 6:] = False
    right[2:, 2:6] = False  # scenes 2 and 3 are level
    assert choose(samples, right) == Shown("val", 2, "2 count?")
    right[3, 3] = True
    assert choose(samples, right) == Shown("val", 3, "3 count?")
