"""docs/models.md and docs/encoders.md show the adapters as they are."""

from __future__ import annotations

import re

import torch
from checkpoint_families import NEEDS_TORCHVISION, PROCESSORS
from tiny_families import FAMILIES

from pitome_vlm.adapters.families import FAMILIES as RECORDS
from pitome_vlm.releases import OLDEST_TRANSFORMERS
from scripts import models_page


def test_the_page_is_current():
    page = models_page.PAGE.read_text(encoding="utf-8")
    assert models_page.filled(page) == page, "run `python -m scripts.models_page`"
    assert len(page.splitlines()) <= 150


def test_the_page_of_encoders_is_current_and_its_snippet_runs(capsys):
    page = models_page.ENCODER_PAGE.read_text(encoding="utf-8")
    assert models_page.encoders_filled(page) == page, "run `python -m scripts.models_page`"
    assert len(page.splitlines()) <= 120
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    scope = {}
    with torch.no_grad():
        exec(code, scope)
    assert "pitome ratio=0.9: 197 -> 131 tokens per image" in capsys.readouterr().out
    assert [len(one) for one in scope["log_sizes"]] == scope["short"].counts == [131, 131]


def test_what_is_said_to_be_run_is_run():
    assert set(models_page.TESTED) == set(PROCESSORS) - set(NEEDS_TORCHVISION)
    assert set(models_page.BY_HAND) == set(NEEDS_TORCHVISION)
    named = {name for record in RECORDS for name in record.model_types}
    assert named == {name.split(",")[0] for name in FAMILIES}
    assert re.search(rf"\b{'.'.join(map(str, OLDEST_TRANSFORMERS))}\b", models_page.table())
