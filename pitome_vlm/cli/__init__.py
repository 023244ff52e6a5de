"""The command line: `pitome-vlm`.

Knows: commands, options and how results are shown in a terminal. Does not know: how anything is
computed; every command calls the public functions of the package. Importing this package does
not import torch, so that `--help` answers at once.
"""

from .app import app, main

__all__ = ["app", "main"]
