"""Run commands in this process, without a terminal."""

from __future__ import annotations

import torch
from typer.testing import CliRunner

from pitome_vlm.cli import app

# A kind of device that no machine has next to the one that this machine may have.
ABSENT_DEVICE = "xpu" if torch.cuda.is_available() else "cuda"


def run(*words: object, text: str | None = None):
    return CliRunner().invoke(app, [str(word) for word in words], input=text)


def fails_in_one_line(result, message: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert "Traceback" not in line
