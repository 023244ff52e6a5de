"""Run commands in this process, without a terminal."""

from __future__ import annotations

from typer.testing import CliRunner

from pitome_vlm.cli import app


def run(*words: object, text: str | None = None):
    return CliRunner().invoke(app, [str(word) for word in words], input=text)


def fails_in_one_line(result, message: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert "Traceback" not in line
