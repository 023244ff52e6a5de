"""The command line: `pitome-vlm`.

Handles commands, options and how results are shown in a terminal; whatever is computed is left to
the public functions of the package. Importing this package does not import torch, so that `--help`
answers at once. What is wrong with an option is a ValueError, which `app.py` shows as one line.
"""

from .app import app, main

__all__ = ["app", "main"]
