"""MergeConfig: everything that decides how tokens are merged, in one validated, savable object.

Knows: the names, ranges and defaults of the options and how they are written to JSON. Does not
know: torch, models, or what an algorithm does with an option.
"""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ..common import __version__, check_range, suggest, whole_number, write_text
from .schedule import Budget

CONFIG_NAME = "pitome_config.json"
FORMAT_VERSION = 1
# Budget of commands and descriptions where none is given and the checkpoint brings none.
DEFAULT_KEEP = 0.25

Stage = Literal["tower", "projector", "both"]
Metric = Literal["keys", "hidden"]
Energy = Literal["paper", "elu", "gaussian"]
Split = Literal["ordered", "random", "high_low"]
Placement = Literal["after_attention", "after_layer"]
Positions = Literal["compact", "mean", "original"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "stage": get_args(Stage),
    "metric": get_args(Metric),
    "energy": get_args(Energy),
    "split": get_args(Split),
    "placement": get_args(Placement),
    "positions": get_args(Positions),
}
# Options that may be left to the algorithm.
_OPTIONAL = ("stage", "metric", "positions")
# Preset name -> the fields it fixes. "released" is what the authors published as code, which is
# not the algorithm of the paper (reference/pitome-paper.md 1.8-1.10); a number made with it must
# be able to say so.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "algorithm": "pitome",
        "metric": "keys",
        "size_bias": False,
        "positions": "compact",
    },
    "released": {
        "algorithm": "pitome",
        "size_bias": False,
        "positions": "compact",
        "energy": "elu",
        "metric": "hidden",
        "placement": "after_layer",
        "early_matching": 0.5,
        "weighted": False,
        "proportional_attention": False,
        "restore_order": False,
    },
}


@dataclass(frozen=True)
class MergeConfig:
    """How the visual tokens of an image are merged. Immutable; exactly one budget word is given.

    Attributes:
        keep: fraction of an image's visual tokens that reach the language model, in (0, 1], or
            "auto" for as few as each image's own redundancy allows.
        tokens: the same as a count per image, >= 1.
        ratio: the paper's r, fraction kept at every merging layer, in (0, 1].
        quality: with keep="auto", share of the variance of an image's tokens that has to be left,
            in (0, 1]; higher keeps more tokens.
        keep_range: with keep="auto", the smallest and the largest fraction an image may keep.
        algorithm: name in the registry (`pitome_vlm.algorithms.available()`).
        stage: merge inside the vision tower, on the features the projector reads, or both. None
            takes the algorithm's own place.
        layers: tower layers that merge (0-based); None means every layer that is run.
        tower_share: with stage="both", the share of the (logarithmic) reduction done in the
            tower, in (0, 1). None takes the algorithm's own.
        projector_steps: steps at the projector; None means the fewest possible.
        metric: what tokens are compared by: attention "keys" averaged over heads (PiToMe paper),
            or "hidden" states. None takes the algorithm's own. At the projector it is always the
            features.
        placement: between attention and MLP (paper eq. 1-2), or after the whole layer.
        proportional_attention: add log(size) to the tower's attention logits (paper section
            3.1). None takes the algorithm's own choice.
        weighted: size-weighted means (paper Algorithm 1), or plain ones.
        restore_order: give the language model the tokens in raster order.
        size_bias: tell the language model how much a token stands for: log(size) on the attention
            logits of visual tokens, in all its layers. None follows `positions`; with both None
            both are on for algorithms that gain by it ("calibration", issue 4).
        positions: tell it where a token sits: at the "mean" raster position of its patches or the
            "original" one of the patch it is named after, with text at its unreduced position;
            "compact" counts the tokens that are left. None follows `size_bias`.
        energy: form of f_m: paper eq. 4, the released code's ELU, or the Gaussian kernel.
        alpha: alpha of eq. 4, >= 0.
        margin: fixed margin m in [-1, 1]; None is the paper's 0.9 - 0.9 l / L.
        split: how the 2k mergeable tokens become sources and destinations.
        protect: keep the N - 2k tokens of lowest energy out of the matching.
        early_matching: up to this relative depth in [0, 1] plain bipartite matching is used
            instead of energy (the released recipe has 0.5); 0 is never.
        temporal: merge the tokens of neighbouring frames of a video with each other, not only
            those of one frame.
        temporal_window: frames whose tokens are merged together, >= 2; windows do not overlap.
        skip_unused_layers: with keep=1.0 too, leave out the tower layers behind the one whose
            features are read (1 of 24 in LLaVA-1.5); nothing that is read changes, to the last
            bit. Where anything is merged they are always left out.
        seed: seed of everything random, 0 to 2**32 - 1.
    """

    keep: float | Literal["auto"] | None = None
    tokens: int | None = None
    ratio: float | None = None
    quality: float = 0.8
    keep_range: tuple[float, float] = (0.0625, 0.5)
    algorithm: str = "pitome_plus"
    stage: Stage | None = None
    layers: tuple[int, ...] | None = None
    tower_share: float | None = None
    projector_steps: int | None = None
    metric: Metric | None = None
    placement: Placement = "after_attention"
    proportional_attention: bool | None = None
    weighted: bool = True
    restore_order: bool = True
    size_bias: bool | None = None
    positions: Positions | None = None
    energy: Energy = "paper"
    alpha: float = 1.0
    margin: float | None = None
    split: Split = "ordered"
    protect: bool = True
    early_matching: float = 0.0
    temporal: bool = False
    temporal_window: int = 8
    skip_unused_layers: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_range_of_keep()
        budget = self.budget
        for word in ("keep", "tokens", "ratio"):
            if not (word == "keep" and self.is_adaptive):
                object.__setattr__(self, word, getattr(budget, word))
        if not isinstance(self.algorithm, str):
            raise TypeError(f"algorithm must be a name, got {self.algorithm!r}")
        for field, allowed in _CHOICES.items():
            value = getattr(self, field)
            if value not in allowed and not (field in _OPTIONAL and value is None):
                hint = suggest(str(value), list(allowed))
                raise ValueError(
                    f"{field} must be one of {', '.join(allowed)}, got {value!r}.{hint}"
                )
        if self.tower_share is not None:
            check_range("tower_share", self.tower_share, 0, 1, open_ends=True)
        check_range("alpha", self.alpha, 0, float("inf"))
        check_range("early_matching", self.early_matching, 0, 1)
        if self.margin is not None:
            check_range("margin", self.margin, -1, 1)
        for field in (
            *("weighted", "restore_order", "protect", "temporal"),
            "skip_unused_layers",
        ):
            if not isinstance(getattr(self, field), bool):
                raise TypeError(f"{field} must be True or False, got {getattr(self, field)!r}")
        for field in ("proportional_attention", "size_bias"):
            value = getattr(self, field)
            if value is not None and not isinstance(value, bool):
                raise TypeError(f"{field} must be True or False, got {value!r}")
        object.__setattr__(self, "seed", whole_number("seed", self.seed, 0, 2**32 - 1))
        window = whole_number("temporal_window", self.temporal_window, 2)
        object.__setattr__(self, "temporal_window", window)
        if self.projector_steps is not None:
            steps = whole_number("projector_steps", self.projector_steps, 1)
            object.__setattr__(self, "projector_steps", steps)
        if self.layers is not None:
            given: Any = self.layers
            if isinstance(given, str) or not isinstance(given, Iterable):
                raise TypeError(f"layers must be a list of layer numbers, got {given!r}")
            layers = tuple(whole_number("layers", layer, 0) for layer in given)
            object.__setattr__(self, "layers", layers)

    def _check_range_of_keep(self) -> None:
        if isinstance(self.keep, str) and self.keep != "auto":
            raise TypeError(f"keep must be a number in (0, 1] or 'auto', got {self.keep!r}")
        check_range("quality", self.quality, 0, 1)
        given: Any = self.keep_range
        if isinstance(given, str) or not isinstance(given, Iterable):
            raise TypeError(f"keep_range must be two fractions, got {given!r}")
        fractions = tuple(given)
        if len(fractions) != 2:
            raise ValueError(f"keep_range must be two fractions, got {len(fractions)}")
        for fraction in fractions:
            check_range("keep_range", fraction, 0, 1)
        if not 0 < fractions[0] <= fractions[1]:
            raise ValueError(
                f"keep_range must be (smallest, largest) with 0 < smallest <= largest <= 1, got "
                f"{fractions}"
            )
        object.__setattr__(self, "keep_range", tuple(float(fraction) for fraction in fractions))

    @property
    def frames_together(self) -> int:
        """Frames of a video whose tokens are merged with each other."""
        return self.temporal_window if self.temporal else 1

    @property
    def is_adaptive(self) -> bool:
        """Whether every image gets a count of its own."""
        return self.keep == "auto"

    @property
    def budget(self) -> Budget:
        """The one budget word that is set; the largest fraction where images differ."""
        keep = self.keep_range[1] if isinstance(self.keep, str) else self.keep
        return Budget(keep=keep, tokens=self.tokens, ratio=self.ratio)

    @classmethod
    def preset(cls, name: str, **options: Any) -> MergeConfig:
        """A named recipe: "paper" or "released" (the authors' published code).

        Args:
            name: preset name.
            **options: budget and further fields; they win over the preset.

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
        """A copy with some fields changed; giving one budget word drops the others."""
        words = {"keep", "tokens", "ratio"}
        if words & {k for k, v in changes.items() if v is not None}:
            changes = {**dict.fromkeys(words), **changes}
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with the format and package version."""
        values = dataclasses.asdict(self)
        for name in ("layers", "keep_range"):
            if values[name] is not None:
                values[name] = list(values[name])
        return {"format_version": FORMAT_VERSION, "pitome_vlm_version": __version__, **values}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MergeConfig:
        """The inverse of `to_dict`.

        A file written by a newer version may hold keys this version does not know: they are
        dropped with a warning that says to upgrade (as PEFT does). In a file of this or an
        older format an unknown key is a misspelling, hence an error.

        Raises:
            ValueError: unknown key, or a value out of range.
            TypeError: a value of the wrong type.
        """
        values = dict(values)
        version = values.pop("format_version", FORMAT_VERSION)
        written_by = values.pop("pitome_vlm_version", __version__)
        if isinstance(version, bool) or not isinstance(version, int) or version < 1:
            raise ValueError(f"format_version must be a whole number >= 1, got {version!r}")
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [key for key in values if key not in known]
        if unknown and version <= FORMAT_VERSION:
            raise ValueError(
                f"unknown merge option {unknown[0]!r}.{suggest(unknown[0], known)} "
                f"Known options: {', '.join(known)}"
            )
        if unknown:
            warnings.warn(
                f"this merge config was written by pitome-vlm {written_by} (format {version}); "
                f"this version ({__version__}, format {FORMAT_VERSION}) does not know and "
                f"ignores {', '.join(map(repr, unknown))}. Upgrade pitome-vlm to use them.",
                stacklevel=2,
            )
        kept = {key: value for key, value in values.items() if key in known}
        for name in ("layers", "keep_range"):
            if isinstance(kept.get(name), list):
                kept[name] = tuple(kept[name])
        return cls(**kept)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write `pitome_config.json` into `folder` (made if missing); atomic.

        Raises:
            NotADirectoryError: `folder` is a file.
        """
        target = Path(folder)
        if target.exists() and not target.is_dir():
            raise NotADirectoryError(f"{target} is a file; give a folder to write {CONFIG_NAME} to")
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        return write_text(target / CONFIG_NAME, text)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> MergeConfig:
        """Read `pitome_config.json` from a folder, or the JSON file itself.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a JSON object, or holds a wrong value.
        """
        path = Path(folder)
        path = path / CONFIG_NAME if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(
                f"no merge config at {path}; MergeConfig(...).save_pretrained(folder) writes one"
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} must hold a JSON object, got {type(values).__name__}")
        try:
            return cls.from_dict(values)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{path}: {error}") from error

    def options(self) -> dict[str, Any]:
        """The fields that differ from their defaults, for a one-line summary."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }

    def summary(self) -> str:
        """One line, for instance `pitome keep=0.25 energy=elu`."""
        shown = {k: v for k, v in self.options().items() if k != "algorithm"}
        return " ".join([self.algorithm, *(f"{k}={v}" for k, v in shown.items())])
