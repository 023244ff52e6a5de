"""Tuning without a model: an asker whose mistakes are known for every setting."""

from __future__ import annotations

import json
import math

import numpy as np

from pitome_vlm.measure.tune import Plan, Recipe, Row
from pitome_vlm.measure.tune.asking import UNREDUCED, Replies
from pitome_vlm.measure.tune.smaller import Smaller
from pitome_vlm.measure.tune.split import split_by_image
from pitome_vlm.measure.tune.tuner import run
from pitome_vlm.merge.config import MergeConfig

TOKENS = 144
BUDGETS = (108, 72, 36, 18, 9)
RECIPES = [Recipe("pitome", {"algorithm": "pitome"}), Recipe("tome", {"algorithm": "tome"})]


class StubAsker:
    """Answers "yes", or "no" to a share of the rows that is known for every setting.

    Row r is answered wrong where its difficulty (in [0, 1), evenly spread) is below that share.
    Smaller images, where there are any, are answered wrong to a share `smaller` of the rows.
    """

    tokens_in = TOKENS
    counted_per = "image"

    def __init__(self, rows, share, *, interrupt_after=None, smallest=1, smaller=None):
        order = np.random.default_rng(7).permutation(len(rows))
        self.difficulty = order / len(rows)
        self.share = share
        self.asked: list[tuple[MergeConfig, tuple[int, ...]]] = []
        self.interrupt_after = interrupt_after
        self.smallest = smallest
        self.version = "1"
        self.smaller = smaller
        self.asked_smaller = 0

    def wrong(self, config, row):
        return config != UNREDUCED and self.difficulty[row] < self.share(config, row)

    def tokens(self, config):
        if config.tokens is not None and config.tokens < self.smallest:
            raise ValueError(f"the smallest count is {self.smallest}")
        return TOKENS if config.tokens is None else config.tokens

    def ask(self, config, rows, reference, advance):
        if self.interrupt_after is not None and len(self.asked) == self.interrupt_after:
            raise KeyboardInterrupt
        self.asked.append((config, tuple(rows)))
        advance(len(rows))
        answers = ["no" if self.wrong(config, row) else "yes" for row in rows]
        if reference is None:
            return Replies(answers, first=np.full((len(rows), 3), -math.log(3), np.float32))
        assert len(reference) == len(rows)
        return Replies(answers, divergence=[float(answer == "no") for answer in answers])

    def ask_smaller(self, config, rows, advance):
        if self.smaller is None:
            raise ValueError("the stub has no images")
        self.asked_smaller += 1
        advance(len(rows))
        answers = ["no" if self.difficulty[row] < self.smaller else "yes" for row in rows]
        return Smaller("images scaled down", config.tokens, config.tokens, answers, 9.0, 12.5)

    def facts(self):
        return {"model": "stub", "version": self.version}

    def savings(self, config):
        return ""


def by_tokens(**losses):
    """Shares by algorithm and budget: by_tokens(pitome={36: 0.1})."""

    def share(config, row):
        return losses.get(config.algorithm, {}).get(config.tokens, 0.0)

    return share


def stub_rows(count=400, per_image=2, answers=("yes",)):
    rows = [
        Row((f"{i // per_image}.png",), f"question {i}", answers, f"row {i}") for i in range(count)
    ]
    return rows, [(str(i // per_image),) for i in range(count)]


def tuned(share, *, rows=None, plan=None, folder=None, resume=False, overwrite=False, **stub):
    rows, digests = rows or stub_rows()
    asker = StubAsker(rows, share, **stub)
    plan = plan or Plan(recipes=RECIPES, budgets=BUDGETS)
    options = {"folder": folder, "resume": resume, "overwrite": overwrite}
    return asker, run(asker, rows, digests, plan, **options)


def comparable(result):
    """Everything but how long it took."""
    values = result.to_dict()
    for cell in (*values["search"], *values["check"]):
        del cell["seconds"]
    return values


def split_of(rows):
    return split_by_image(rows[1], seed=0)


def write_jsonl(folder, *lines):
    file = folder / "my.jsonl"
    file.write_text("\n".join(v if isinstance(v, str) else json.dumps(v) for v in lines))
    return file
