"""Where output goes: answers to stdout, everything else to stderr.

Knows: consoles and what must not reach them. Does not know: commands.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

from rich.console import Console

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """One line for the person at the terminal."""
    err.print(printable(text), markup=False, soft_wrap=True)


def write(text: str, *, end: str = "\n") -> None:
    """Text that may be piped on, exactly as it is but for control characters."""
    out.print(printable(text), markup=False, soft_wrap=True, end=end)
    out.file.flush()


def printable(text: str) -> str:
    """Without control characters: what a model or a file says must not steer the terminal."""
    return "".join(c for c in text if c in "\n\t" or (c >= " " and not "\x7f" <= c <= "\x9f"))


def one_line(text: str) -> str:
    """A message with its line breaks and runs of spaces removed."""
    return " ".join(text.split())


@contextlib.contextmanager
def quiet(verbose: bool = False) -> Iterator[None]:
    """Keep the libraries' progress bars and log lines out of the terminal for a while.

    Warnings of Python become one line each. Everything is put back afterwards.

    Args:
        verbose: leave the libraries as they are.
    """
    if verbose:
        yield
        return
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        enable_progress_bars,
    )
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    downloads = not are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if downloads and err.is_terminal:
        # transformers silences the hub as well, but a download of minutes has to show.
        enable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning  # type: ignore[assignment]
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
        elif downloads:
            enable_progress_bars()


def _show_warning(message: Any, category: type[Warning], *rest: Any) -> None:
    del rest
    # Deprecations and the like are for developers of the libraries, not for people at a terminal.
    if issubclass(category, UserWarning):
        say(f"warning: {one_line(str(message))}")
