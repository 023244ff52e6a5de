"""The ablation's own parts: the distance term, and what a run resumes with."""

import argparse
import json

import pytest
import torch

import pitome_vlm
from pitome_vlm.demo import load_split
from pitome_vlm.measure.demo_benchmark import ask, batches
from scripts.demo import ablation, spread


def test_the_spread_of_a_token_is_that_of_its_patches():
    frequencies = torch.tensor([1.0, 0.1])
    source = torch.tensor([0, 1, 1, 0])
    found = spread.spread(source, torch.tensor([0.0, 1.5]), frequencies)
    far = (torch.tensor([0.0, 3.0])[:, None] * frequencies).cos().mean()
    near = (torch.tensor([0.5, 0.5])[:, None] * frequencies).cos().mean()
    torch.testing.assert_close(found, torch.stack([2 - far, 2 - near]))
    alone = spread.spread(torch.arange(3), torch.arange(3.0), frequencies)
    assert torch.equal(alone, torch.ones(3))


@torch.no_grad()
def test_answers_without_the_distance_are_those_of_generate(monkeypatch):
    model, processor = pitome_vlm.load("demo", dtype="float32")
    batch = next(batches(processor, load_split("val", 8), "val", 8))
    with pitome_vlm.wrapped(model, tokens=9):
        expected = ask(model, processor, batch)
        assert spread.ask(model, processor, batch, told=False) == expected
        # Tokens that count for nothing cannot be answered from.
        monkeypatch.setattr(spread, "spreads", lambda *_: torch.full((72,), 1e-9))
        assert spread.ask(model, processor, batch) != expected


def test_a_run_goes_on_only_with_the_same_model_and_questions(tmp_path):
    wanted, stored = argparse.Namespace(output=tmp_path), tmp_path / "ablation_val.json"
    same = {"questions": 600, "checkpoint": "sha256:1"}
    assert ablation.started(wanted, stored, same)["cells"] == {}
    stored.write_text(json.dumps({"cells": {"a": 1}, "provenance": {"questions": 600}}))
    assert ablation.started(wanted, stored, same)["cells"] == {"a": 1}
    for name, value in (("questions", 20), ("checkpoint", "sha256:2")):
        stored.write_text(json.dumps({"cells": {}, "provenance": same | {name: value}}))
        with pytest.raises(SystemExit, match=f"{name} {value}, not"):
            ablation.started(wanted, stored, same)
