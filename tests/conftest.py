"""Shared by all tests: one thread per worker, no hub, no cut-off pictures."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch
from hypothesis import settings
from PIL import ImageFile

torch.set_num_threads(1)
# Rules are checked, not times: a busy machine must not fail a test. The same draws in every run, so
# that a failure can be repeated; `make fuzz` draws anew.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.register_profile("fuzz", deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(autouse=True)
def strict_pictures(monkeypatch):
    """Undo what importing lmms-eval does to PIL in the whole process: accept cut-off pictures."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
