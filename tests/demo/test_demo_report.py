"""What the demo report says about made-up answers."""

from __future__ import annotations

import numpy as np

import pitome_vlm
from pitome_vlm import MergeConfig
from pitome_vlm.demo import Sample
from pitome_vlm.measure.demo_benchmark import Outcome, Setting
from scripts.demo import report, times
from scripts.demo.benchmark import NO_MERGING

TYPES = ("count", "colour", "shape")


def made_up(wrong):
    """Samples of 60 scenes, and rows of which `wrong(sample, tokens)` says what was missed."""
    samples = [
        Sample(scene, ("scattered", "dense")[scene % 2], kind, f"{kind}?", "yes")
        for scene in range(60)
        for kind in TYPES
    ]
    outcomes = []
    for name, tokens in (("none", 144), (report.RECOMMENDED, 36), (report.RECOMMENDED, 18)):
        config = MergeConfig(tokens=tokens)
        correct = np.array([not (tokens < 144 and wrong(one, tokens)) for one in samples])
        outcomes.append(Outcome(Setting(name, config), tokens, [], correct))
    return samples, report.rows_of(outcomes)


def section(samples, rows):
    """Lines of the table in the report's warning."""
    facts = {"questions": len(samples), "split": "val", "dtype": "float32"}
    costs = [{"tokens": 144, "prefill_flops": 1, "kv_bytes_per_image": 1}]
    text = report.report(samples, rows, costs, facts)
    own = text.split("## Do not merge here\n\n", 1)[1].split("\n## ", 1)[0]
    return own, [line for line in own.splitlines() if line.startswith(("| question", "| kind"))]


def test_types_that_lose_more_than_the_bound_are_named_with_their_numbers():
    # A third of the counts is lost at 18 tokens, in scenes of both kinds alike; of the colours, one
    # question at 18 tokens, which may be chance.
    samples, rows = made_up(
        lambda one, tokens: (
            tokens == 18
            and (
                (one.question_type == "count" and one.scene_id % 3 == 0)
                or (one.question_type == "colour" and one.scene_id == 5)
            )
        )
    )
    text, lines = section(samples, rows)
    assert "exceeds 1 point" in text
    assert "None." not in text
    count = next(line for line in lines if "count" in line)
    cells = [cell.strip() for cell in count.strip("|").split("|")]
    assert cells[:4] == ["question type: count", "60", "100.0", ""]
    assert cells[4].startswith("-33.3 [-4")
    assert float(cells[4].rstrip("]").split(", ")[1]) < -1
    assert not any("colour" in line or "shape" in line for line in lines)
    assert len([line for line in lines if "kind of scene" in line]) == 2


def test_one_kind_of_scene_alone_is_named():
    samples, rows = made_up(lambda one, tokens: one.kind == "dense" and one.scene_id % 4 == 1)
    _, lines = section(samples, rows)
    named = [line.split("|")[1].strip() for line in lines if line.startswith("| kind")]
    assert named == ["kind of scene: dense"]


def test_without_such_a_loss_it_says_none():
    samples, rows = made_up(lambda one, tokens: one.scene_id == 7)
    text, lines = section(samples, rows)
    assert text.startswith("None.\n")
    assert not lines


def test_the_first_token_is_timed_by_the_clock_and_in_processor_time(monkeypatch):
    monkeypatch.setattr(times, "ROUNDS", 2)
    monkeypatch.setattr(times, "BATCHES", (1,))
    compared = [(144, Setting("none", NO_MERGING)), (9, Setting("nine", MergeConfig(tokens=9)))]
    model, processor = pitome_vlm.load("demo", dtype="float32")
    rows = times.time_rows(model, processor, "val", compared, "some machine")
    assert [(row["method"], row["tokens"], row["batch"]) for row in rows] == [
        ("none", 144, 1),
        ("nine", 9, 1),
    ]
    for row in rows:
        assert min(row["first_token_ms"], row["processor_ms"]) > 0
        assert min(row["first_token_iqr_ms"], row["processor_iqr_ms"]) >= 0


def test_the_table_shows_processor_time_where_it_was_taken():
    def row(method, batch, **ms):
        return {"method": method, "tokens": 9, "batch": batch, "hardware": "some machine", **ms}

    wall = {"first_token_ms": 30.0, "first_token_iqr_ms": 2.0}
    old = [row("none", 1, **wall), row("nine", 1, **(wall | {"first_token_ms": 15.0}))]
    text = "\n".join(times.time_table(old, ("none", 9)))
    assert "| 9 | nine | 15 ms, IQR 2 (2.0x) |" in text
    assert "processor" not in text.lower()
    spent = {"processor_ms": 24.0, "processor_iqr_ms": 1.0}
    new = [old[0] | spent, old[1] | spent | {"processor_ms": 8.0}, row("other", 1, **wall)]
    text = "\n".join(times.time_table(new, ("none", 9)))
    assert "| visual tokens | method | batch 1 | batch 1, processor time |" in text
    assert "| 9 | nine | 15 ms, IQR 2 (2.0x) | 8 ms, IQR 1 (3.0x) |" in text
    assert "| 9 | other | 30 ms, IQR 2 (1.0x) | not timed |" in text
    assert "Processor time is that of the one thread." in text
