"""The words of merge options and what they are by default."""

from __future__ import annotations

from typing import Literal

BUDGET_WORDS = ("keep", "tokens", "ratio")
# Budget of commands and descriptions where none is given and the checkpoint brings none.
DEFAULT_KEEP = 0.25
DEFAULT_ALGORITHM = "pitome_plus"

Stage = Literal["tower", "projector", "both"]
Metric = Literal["keys", "hidden"]
Placement = Literal["after_attention", "after_layer"]
Positions = Literal["compact", "mean", "median", "original"]
Adapt = Literal["features", "pixels"]
