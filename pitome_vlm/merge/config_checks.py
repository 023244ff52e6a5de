"""What values of the shared merge options are refused, and what form the others get.

For `MergeConfig`, which calls these once, while it is made.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, get_args

from ..common import check_choice, check_flag, check_range, whole_number
from .words import BUDGET_WORDS, Adapt, Metric, Placement, Positions, Stage


def budget(config: Any) -> None:
    """Check budget, quality and range; numbers become plain ones."""
    if isinstance(config.keep, str) and config.keep != "auto":
        raise TypeError(f"keep must be a number in (0, 1] or 'auto', got {config.keep!r}")
    check_range("quality", config.quality, 0, 1)
    given: Any = config.keep_range
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(f"keep_range must be two fractions, got {given!r}")
    fractions = tuple(given)
    for fraction in fractions:
        check_range("keep_range", fraction, 0, 1)
    if len(fractions) != 2 or not 0 < fractions[0] <= fractions[1]:
        raise ValueError(
            f"keep_range must be (smallest, largest) with 0 < smallest <= largest <= 1, got "
            f"{fractions}"
        )
    config._set("keep_range", tuple(float(fraction) for fraction in fractions))
    if config.algorithm == "none" and config.keep is config.tokens is config.ratio is None:
        config._set("keep", 1.0)  # all that it can do
    words = config.budget
    for word in BUDGET_WORDS:
        if not (word == "keep" and config.is_adaptive):
            config._set(word, getattr(words, word))


def choices(config: Any) -> None:
    """Check names and flags."""
    if not isinstance(config.algorithm, str):
        raise TypeError(f"algorithm must be a name, got {config.algorithm!r}")
    check_choice("placement", config.placement, get_args(Placement))
    check_choice("adapt", config.adapt, get_args(Adapt))
    for name, kind in (("stage", Stage), ("metric", Metric), ("positions", Positions)):
        if getattr(config, name) is not None:
            check_choice(name, getattr(config, name), get_args(kind))
    maybe = ("proportional_attention", "size_bias")
    for name in ("weighted", "restore_order", "temporal", "skip_unused_layers", "compile", *maybe):
        if name not in maybe or getattr(config, name) is not None:
            check_flag(name, getattr(config, name))


def numbers(config: Any) -> None:
    """Check the other numbers; whole ones become `int`."""
    if config.tower_share is not None:
        check_range("tower_share", config.tower_share, 0, 1, open_ends=True)
    config._set("seed", whole_number("seed", config.seed, 0, 2**32 - 1))
    config._set("temporal_window", whole_number("temporal_window", config.temporal_window, 2))
    if config.projector_steps is not None:
        steps = whole_number("projector_steps", config.projector_steps, 1)
        config._set("projector_steps", steps)
    if config.layers is not None:
        given: Any = config.layers
        if isinstance(given, str) or not isinstance(given, Iterable):
            raise TypeError(f"layers must be a list of layer numbers, got {given!r}")
        config._set("layers", tuple(whole_number("layers", layer, 0) for layer in given))
