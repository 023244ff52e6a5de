"""Run commands in this process on a pseudo-terminal, as a person sees them: colours, 80 columns."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import typer.main

from pitome_vlm.cli import app, terminal

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass
class Shown:
    """What a command left on the terminal.

    Attributes:
        code: its exit code.
        raw: every character, control sequences included, stdout and stderr together.
    """

    code: int
    raw: str

    @property
    def text(self) -> str:
        """Without control sequences, and with plain line ends."""
        return CONTROL.sub("", self.raw).replace("\r\n", "\n")

    @property
    def lines(self) -> list[str]:
        """Every line as it was at any time; progress bars write over theirs."""
        return re.split(r"[\r\n]+", self.text)

    @property
    def words(self) -> set[str]:
        return {word for word in re.split(r"[\s│╭╮╰╯─]+", self.text) if word}


def on_terminal(*words: object, columns: int = 80, typed: str = "") -> Shown:
    """Run one command line; `typed` is waiting at the keyboard."""
    command = typer.main.get_command(app)
    with _terminal(columns, typed) as shown:
        code = command.main([str(word) for word in words], "pitome-vlm", standalone_mode=False)
        shown.code = code if isinstance(code, int) else 0
    return shown


@contextmanager
def _terminal(columns: int, typed: str) -> Iterator[Shown]:
    keyboard, device = pty.openpty()
    fcntl.ioctl(device, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    os.write(keyboard, typed.encode())
    shown, pieces = Shown(0, ""), []
    reader = threading.Thread(target=_read, args=(keyboard, pieces))
    reader.start()
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "CI")}
    try:
        with (
            patch.dict(os.environ, environment | {"TERM": "xterm-256color"}, clear=True),
            _standard_streams(device),
        ):
            yield shown
    finally:
        reader.join()
        os.close(keyboard)
        shown.raw = b"".join(pieces).decode()


@contextmanager
def _standard_streams(device: int) -> Iterator[None]:
    """Put a device in the place of stdin, stdout and stderr; it is closed at the end."""
    kept = [os.dup(number) for number in range(3)]
    for number in range(3):
        os.dup2(device, number)
    os.close(device)
    line_by_line = {"closefd": False, "buffering": 1, "encoding": "utf-8"}
    try:
        with (
            open(0, closefd=False) as stdin,
            open(1, "w", **line_by_line) as stdout,
            open(2, "w", **line_by_line) as stderr,
            patch.multiple(sys, stdin=stdin, stdout=stdout, stderr=stderr),
        ):
            _renew()
            yield
    finally:
        for number, descriptor in enumerate(kept):
            os.dup2(descriptor, number)
            os.close(descriptor)
        _renew()


def _renew() -> None:
    """Consoles look at the terminal's abilities when they are made."""
    terminal.out.__init__(highlight=False)
    terminal.err.__init__(stderr=True, highlight=False)


def _read(keyboard: int, pieces: list[bytes]) -> None:
    while True:
        try:
            piece = os.read(keyboard, 65536)
        except OSError:  # the last one to hold the other end has closed it
            return
        if not piece:
            return
        pieces.append(piece)
