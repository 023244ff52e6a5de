"""`tune`: what is kept in the folder of a run, and who may go on with it."""

from __future__ import annotations

import re

import pytest
from tuning import BUDGETS, RECIPES, StubAsker, by_tokens, comparable, stub_rows, tuned

from pitome_vlm.measure.tune import Plan
from pitome_vlm.measure.tune.asking import UNREDUCED
from pitome_vlm.measure.tune.tuner import run
from pitome_vlm.merge.config import MergeConfig


def test_a_run_that_was_interrupted_resumes_to_the_same_result_without_asking_again(tmp_path):
    share = by_tokens(pitome={36: 0.005, 18: 0.03, 9: 0.3}, tome={18: 0.006, 9: 0.1})
    whole, undisturbed = tuned(share, rows=stub_rows(60), folder=tmp_path / "whole")
    total = len(whole.asked)
    for stop in range(total):
        folder = tmp_path / str(stop)
        rows, digests = stub_rows(60)
        first = StubAsker(rows, share, interrupt_after=stop)
        plan = Plan(recipes=RECIPES, budgets=BUDGETS)
        with pytest.raises(KeyboardInterrupt):
            run(first, rows, digests, plan, folder=folder)
        second, result = tuned(share, rows=(rows, digests), folder=folder, resume=True)
        assert comparable(result) == comparable(undisturbed)
        assert len(first.asked) + len(second.asked) == total
        assert not set(first.asked) & set(second.asked)
    again, result = tuned(share, rows=stub_rows(60), folder=tmp_path / "whole", resume=True)
    assert again.asked == []
    assert result.to_dict() == undisturbed.to_dict()


def test_a_cell_that_is_missing_is_measured_again_and_a_damaged_one_is_named(tmp_path):
    share = by_tokens(pitome={9: 0.5})
    _, undisturbed = tuned(share, folder=tmp_path)
    *_, last = sorted((tmp_path / "cells").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    content = last.read_bytes()
    last.unlink()
    asker, result = tuned(share, folder=tmp_path, resume=True)
    assert len(asker.asked) == 1
    assert comparable(result) == comparable(undisturbed)
    last.write_bytes(content[:50])
    with pytest.raises(
        ValueError, match=rf"{last.name} is not valid JSON .*; delete it to measure it"
    ):
        tuned(share, folder=tmp_path, resume=True)


def test_a_lost_reference_is_computed_again(tmp_path):
    share = by_tokens(pitome={9: 0.5})
    tuned(share, folder=tmp_path)
    (tmp_path / "arrays" / "unreduced_search.npy").write_bytes(b"")
    asker, _ = tuned(share, folder=tmp_path, resume=True)
    assert [config for config, _ in asker.asked] == [UNREDUCED]


def test_folders_with_results_are_refused_by_name(tmp_path):
    tuned(by_tokens(), folder=tmp_path)
    there = r"already holds \d+ finished cells; --resume .*, --overwrite"
    with pytest.raises(FileExistsError, match=re.escape(str(tmp_path)) + f" {there}"):
        tuned(by_tokens(), folder=tmp_path)
    rows, digests = stub_rows()
    other = StubAsker(rows, by_tokens())
    other.version = "2"
    with pytest.raises(ValueError, match=r"with other settings \(version was '1', is '2'"):
        run(other, rows, digests, Plan(), folder=tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"with other settings \(seed was 0, is 1"):
        tuned(by_tokens(), folder=tmp_path, resume=True, plan=Plan(recipes=RECIPES, seed=1))
    weights = tmp_path / "checkpoint"
    MergeConfig(keep=0.5).save_pretrained(weights)
    with pytest.raises(FileExistsError, match=r"already holds pitome_config\.json"):
        tuned(by_tokens(), folder=weights)
    with pytest.raises(ValueError, match="is a file"):
        tuned(by_tokens(), folder=weights / "pitome_config.json")
    assert MergeConfig.from_pretrained(weights).keep == 0.5


def test_overwriting_deletes_what_another_run_found(tmp_path):
    first, _ = tuned(by_tokens(), folder=tmp_path)
    again, _ = tuned(by_tokens(), folder=tmp_path, overwrite=True)
    assert again.asked == first.asked
    assert len(list((tmp_path / "cells").iterdir())) == len(again.asked)


def test_looking_again_with_another_target_counts_as_a_further_look(tmp_path):
    share = by_tokens(pitome={18: 0.02, 9: 0.08})
    one = Plan(max_loss=0.2, recipes=RECIPES[:1], budgets=BUDGETS)
    two = Plan(max_loss=0.05, recipes=RECIPES[:1], budgets=BUDGETS)
    assert tuned(share, plan=one, folder=tmp_path)[1].loss.level == 0.95
    assert tuned(share, plan=two)[1].loss.level == 0.95
    for _ in range(2):
        again = tuned(share, plan=two, folder=tmp_path, resume=True)[1]
        assert again.loss.level == pytest.approx(0.975)
