"""Weights load under every name that checkpoints give them."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm.version", reason="make test-vllm builds an environment with vLLM")

from compared import UNCALIBRATED, answers
from served_models import NAMINGS, reference, save_under_names


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming_of_weights(engine, tiny, requests, tmp_path, naming):
    path = save_under_names(tiny, tmp_path / "renamed", naming)
    (found,) = engine(path, requests, UNCALIBRATED)
    assert answers(found) == reference(tiny, requests, UNCALIBRATED)
