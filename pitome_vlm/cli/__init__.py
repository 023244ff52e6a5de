"""The command line: `pitome-vlm`.

Handles commands, options and how results are shown in a terminal; whatever is computed is left to
the public functions of the package. Importing this package does not import torch, so that `--help`
answers at once.
"""

from .app import app, main

__all__ = ["app", "main"]
