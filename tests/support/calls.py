"""Counting calls of Python functions by file and name, with the interpreter's profiler hook."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from pathlib import Path

import pitome_vlm

PACKAGE = str(Path(pitome_vlm.__file__).parent)


class Calls:
    """Calls of functions of the package, in order, as (file within the package, function)."""

    def __init__(self) -> None:
        self.made: list[tuple[str, str]] = []

    def count(self, name: str) -> int:
        """Calls of functions of this name."""
        return Counter(function for _, function in self.made)[name]


@contextlib.contextmanager
def package_calls():
    """Record every call into the package for the length of a block."""
    calls = Calls()

    def hook(frame, event, argument):
        del argument
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(PACKAGE):
            calls.made.append((file[len(PACKAGE) + 1 :], frame.f_code.co_name))

    previous = sys.getprofile()
    sys.setprofile(hook)
    try:
        yield calls
    finally:
        sys.setprofile(previous)
