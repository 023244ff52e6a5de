"""MergeConfig: everything that decides how tokens are merged, in one validated, savable object.

Handles names, ranges and defaults of the options that all algorithms share, and how options are
written to JSON. An algorithm's own options are described by that algorithm (`options.py`).
"""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..common import suggest
from . import config_checks as checks
from . import registry
from .config_file import CONFIG_NAME, FORMAT_VERSION, options_in, plain, read, write
from .options import Own, as_kind, defaults, owners, parse, values_of, without_foreign
from .presets import PRESETS
from .steps import Budget
from .words import (
    BUDGET_WORDS,
    DEFAULT_ALGORITHM,
    DEFAULT_KEEP,
    Adapt,
    Metric,
    Placement,
    Positions,
    Stage,
)

__all__ = [
    "BUDGET_WORDS",
    "CONFIG_NAME",
    "DEFAULT_KEEP",
    "FORMAT_VERSION",
    "PRESETS",
    "SHARED",
    "Adapt",
    "MergeConfig",
    "Metric",
    "Placement",
    "Positions",
    "Stage",
    "option_names",
]


@dataclass(frozen=True, init=False, repr=False)
class MergeConfig:
    """How the visual tokens of an image are merged. Immutable; exactly one budget word is given.

    Options of the algorithm itself are given by name next to the shared ones:
    `MergeConfig(keep=0.25, algorithm="pitome", energy="elu")`.

    Attributes:
        keep: fraction of an image's visual tokens that reach the language model, in (0, 1], or
            "auto" for as few as each image's own redundancy allows.
        tokens: the same as a count per image, >= 1.
        ratio: the paper's r, fraction kept at every merging layer, in (0, 1].
        adapt: with keep="auto", what decides an image's count: its "features" as the tower makes
            them, or its "pixels" (the share of patches that are unlike those next to them), with
            which counts are known before the tower runs.
        quality: with adapt="features", share of the variance of an image's tokens that has to be
            left, in [0, 1]; higher keeps more tokens.
        keep_range: with keep="auto", the smallest and the largest fraction an image may keep.
        algorithm: name in the registry (`pitome_vlm.algorithms.available()`).
        stage: merge inside the vision tower, on the features the projector reads, or both. None
            takes the algorithm's own place.
        layers: tower layers that merge (0-based). None means every layer that is run; with
            `pitome_plus` at stage="both", those after three and five eighths of the tower; in
            towers that no published algorithm was made for, those after a quarter and a half; in
            encoders on their own every other one, all with `ratio`.
        tower_share: with stage="both", the share of the (logarithmic) reduction done in the
            tower, in (0, 1). None takes the algorithm's own.
        projector_steps: steps at the projector; None means the fewest possible.
        metric: what tokens are compared by in the tower: attention "keys" averaged over heads
            (PiToMe paper), or "hidden" states. None takes the algorithm's own.
        placement: between attention and MLP (paper eq. 1-2), or after the whole layer.
        proportional_attention: add log(size) to the tower's attention logits (paper section
            3.1). None takes the algorithm's own choice.
        weighted: size-weighted means (paper Algorithm 1), or plain ones.
        restore_order: give the language model the tokens in raster order, not in that of the
            algorithm.
        size_bias: tell the language model how much a token stands for: log(size) on the attention
            logits of visual tokens, in all its layers. None follows `positions`; with both None
            both are on for algorithms that gain by it (this is called calibration).
        positions: tell it where a token sits: at the "mean" or "median" raster position of its
            patches or the "original" one of the patch it is named after, with text at its
            unreduced position; "compact" counts the tokens that are left. None follows `size_bias`.
        temporal: merge tokens of neighbouring frames of a video too, not only those of one frame.
        temporal_window: frames whose tokens are merged together, >= 2; windows do not overlap.
        skip_unused_layers: with keep=1.0 too, leave out the tower layers whose output nobody reads
            (1 of 24 in LLaVA-1.5), as is always done where anything is merged.
        compile: compile the decision which tokens merge in the tower (`torch.compile`, one graph
            per merging layer and batch size, made when first needed), and on a CUDA device choose
            tokens after the tower in one Triton kernel. For towers that see images of one size.
        seed: seed of everything random, 0 to 2**32 - 1.
        options: the algorithm's own options, an object of `Algorithm.options`; None where all are
            at their defaults. See `own`.
    """

    keep: float | Literal["auto"] | None
    tokens: int | None
    ratio: float | None
    adapt: Adapt
    quality: float
    keep_range: tuple[float, float]
    algorithm: str
    stage: Stage | None
    layers: tuple[int, ...] | None
    tower_share: float | None
    projector_steps: int | None
    metric: Metric | None
    placement: Placement
    proportional_attention: bool | None
    weighted: bool
    restore_order: bool
    size_bias: bool | None
    positions: Positions | None
    temporal: bool
    temporal_window: int
    skip_unused_layers: bool
    compile: bool
    seed: int
    options: object | None

    # Written out, because a generated one could not take the algorithm's own options by name.
    def __init__(
        self,
        keep: float | Literal["auto"] | None = None,
        tokens: int | None = None,
        ratio: float | None = None,
        *,
        adapt: Adapt = "features",
        quality: float = 0.8,
        keep_range: tuple[float, float] = (0.0625, 0.5),
        algorithm: str = DEFAULT_ALGORITHM,
        stage: Stage | None = None,
        layers: Iterable[int] | None = None,
        tower_share: float | None = None,
        projector_steps: int | None = None,
        metric: Metric | None = None,
        placement: Placement = "after_attention",
        proportional_attention: bool | None = None,
        weighted: bool = True,
        restore_order: bool = True,
        size_bias: bool | None = None,
        positions: Positions | None = None,
        temporal: bool = False,
        temporal_window: int = 8,
        skip_unused_layers: bool = False,
        compile: bool = False,
        seed: int = 0,
        options: object | None = None,
        **own: Any,
    ) -> None:
        given = locals()
        for name in SHARED:
            self._set(name, given[name])
        checks.choices(self)
        # First: a misspelt budget word is no missing budget.
        self._set("options", parse(self.algorithm, SHARED, options, own))
        checks.budget(self)
        checks.numbers(self)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def frames_together(self) -> int:
        """Frames of a video whose tokens are merged with each other."""
        return self.temporal_window if self.temporal else 1

    @property
    def is_adaptive(self) -> bool:
        """Whether every image gets a count of its own."""
        return self.keep == "auto"

    @property
    def by_pixels(self) -> bool:
        """Whether every image's own count follows from its pixels."""
        return self.is_adaptive and self.adapt == "pixels"

    @property
    def budget(self) -> Budget:
        """The one budget word that is set; the largest fraction where images differ."""
        keep = self.keep_range[1] if isinstance(self.keep, str) else self.keep
        return Budget(keep=keep, tokens=self.tokens, ratio=self.ratio)

    def own(self, kind: type[Own]) -> Own:
        """The algorithm's own options.

        Args:
            kind: their class. Where the config is for another algorithm, all are at their
                defaults.
        """
        return as_kind(self.options, kind)

    @classmethod
    def preset(cls, name: str, **options: Any) -> MergeConfig:
        """A named recipe: "paper" or "released" (the authors' published code).

        Args:
            name: preset name.
            **options: budget and further options; they win over the preset.

        Raises:
            ValueError: unknown preset.
        """
        if name not in PRESETS:
            raise ValueError(
                f"preset must be one of {', '.join(PRESETS)}, got {name!r}."
                + suggest(name, list(PRESETS))
            )
        return cls.from_dict({**PRESETS[name], **options})

    def replace(self, **changes: Any) -> MergeConfig:
        """A copy with some options changed.

        Giving one budget word drops the others; naming another algorithm drops the options that
        it does not have.
        """
        if any(changes.get(word) is not None for word in BUDGET_WORDS):
            changes = {**dict.fromkeys(BUDGET_WORDS), **changes}
        elif changes.get("algorithm") == "none":
            changes = {**changes, **dict.fromkeys(BUDGET_WORDS)}
        own = {} if self.options is None or "options" in changes else values_of(self.options)
        algorithm = changes.get("algorithm", self.algorithm)
        if own and algorithm != self.algorithm:
            kept = defaults(algorithm)
            own = {name: value for name, value in own.items() if name in kept}
        shared = {name: getattr(self, name) for name in SHARED}
        return type(self)(**{**shared, **own, **changes})

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with the format and package version.

        The algorithm's own options stand next to the shared ones, all of them.
        """
        shared = {name: getattr(self, name) for name in SHARED}
        own = defaults(self.algorithm) if self.options is None else values_of(self.options)
        return plain(shared | own)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MergeConfig:
        """The inverse of `to_dict`.

        Raises:
            ValueError: unknown algorithm, a value out of range, or an unknown key, which in a file
                of a newer format is a warning.
            TypeError: a value of the wrong type.
        """
        known = options_in(values, lambda name: name in SHARED or bool(owners(name)))
        if "format_version" in values:
            known = without_foreign(known, known.get("algorithm", DEFAULT_ALGORITHM), SHARED)
        return cls(**known)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write `pitome_config.json` into `folder` (made if missing); atomic.

        Raises:
            NotADirectoryError: `folder` is a file.
        """
        return write(folder, self.to_dict())

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> MergeConfig:
        """Read `pitome_config.json` from a folder, or the JSON file itself.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a JSON object, or holds a wrong value.
        """
        path, values = read(folder)
        try:
            return cls.from_dict(values)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{path}: {error}") from error

    def changed(self) -> dict[str, Any]:
        """The options that differ from their defaults, the algorithm's own among them."""
        found = {name: getattr(self, name) for name in SHARED}
        found = {name: value for name, value in found.items() if value != _DEFAULTS[name]}
        if self.options is not None:
            standard = values_of(type(self.options)())
            own = values_of(self.options).items()
            found |= {name: value for name, value in own if value != standard[name]}
        return found

    def __repr__(self) -> str:
        return f"MergeConfig({', '.join(f'{k}={v!r}' for k, v in self.changed().items())})"

    def summary(self) -> str:
        """One line, for instance `pitome keep=0.25 energy=elu`."""
        shown = {k: v for k, v in self.changed().items() if k != "algorithm"}
        return " ".join([self.algorithm, *(f"{k}={v}" for k, v in shown.items())])


SHARED = tuple(item.name for item in dataclasses.fields(MergeConfig) if item.name != "options")
_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(MergeConfig).parameters.items()
    if name in SHARED
}


def option_names(algorithm: str | None = None) -> list[str]:
    """The names that `MergeConfig` takes: the shared ones, then those of an (or any) algorithm."""
    algorithms = registry.available() if algorithm is None else [algorithm]
    own = (name for one in algorithms for name in defaults(one))
    return list(dict.fromkeys((*SHARED, *own)))
