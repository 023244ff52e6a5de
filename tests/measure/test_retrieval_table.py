"""What scripts/encoders/mteb_eval.py reports, on scores as mteb gives them."""

from __future__ import annotations

import pytest

from scripts.encoders.retrieval_table import scores_of, table

SCORES = {"ndcg_at_10": 0.9, "accuracy": 0.5, "recall_at_1": 0.2, "main_score": 0.9}
SCORES |= {"hit_rate_at_1": 0.5, "hit_rate_at_5": 0.75, "hit_rate_at_10": 1.0}


def test_hit_rates_are_what_is_reported():
    found = scores_of(SCORES)
    assert found == {"hit_rate_at_1": 50, "hit_rate_at_5": 75, "hit_rate_at_10": 100}
    assert scores_of({"accuracy": 0.25, "f1": 0.1}) == {"accuracy": 25}
    for name in ("hit_rate_at_5", "hit_rate_at_10"):
        with pytest.raises(ValueError, match="among the scores of a task"):
            scores_of({key: value for key, value in SCORES.items() if key != name})


def test_rows_of_the_table():
    both = [
        {"task": "I2T", "setting": "none", "scores": scores_of(SCORES), "gflops": 161.715},
        {"task": "Classes", "setting": "pitome", "scores": {"accuracy": 25.0}, "gflops": 93.6},
    ]
    assert table(both).splitlines() == [
        "| task | merging | R@1 | R@5 | R@10 | accuracy | encoder, GFLOP per image |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| I2T | none | 50.0 | 75.0 | 100.0 |  | 161.7 |",
        "| Classes | pitome |  |  |  | 25.0 | 93.6 |",
    ]
