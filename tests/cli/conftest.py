"""A tiny checkpoint and images for the tests of commands."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from checkpoint import save_checkpoint
from PIL import Image


@pytest.fixture(scope="package")
def checkpoint(tmp_path_factory) -> str:
    return str(save_checkpoint(tmp_path_factory.mktemp("llava")))


@pytest.fixture(scope="package")
def image(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("images") / "scene one.png"
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    return str(file)


@pytest.fixture(scope="package")
def files(image, tmp_path_factory) -> dict[str, str]:
    """Files by the word that stands for them in a command line: one image, three that are not."""
    folder = tmp_path_factory.mktemp("bad")
    text, cut, huge = folder / "text.jpg", folder / "cut.png", folder / "huge.png"
    text.write_text("This is no image.\n")
    cut.write_bytes(Path(image).read_bytes()[:5000])
    Image.new("1", (20_000, 10_000)).save(huge)
    return {"IMAGE": image, "TEXT": str(text), "CUT": str(cut), "HUGE": str(huge)}
