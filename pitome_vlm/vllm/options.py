"""From a merge config to vLLM's `--hf-overrides` and back; refuses what vLLM cannot do.

vLLM itself need not be installed. Options travel as
`hf_overrides={"architectures": [...], "pitome": {fields of MergeConfig, max_keep}}`. vLLM hands
them to every process as an attribute of the model's config, so that the process that counts tokens
and those that merge them read the same options.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..common import check_range
from ..merge.config import MergeConfig
from ..merge.schedule import Schedule, TowerShape
from ..merge.steps import Budget
from .language_config import check_language_model
from .served import ARCHITECTURE, ARCHITECTURES, SERVED, served_as

if TYPE_CHECKING:
    from torch import Tensor

    from ..merge.merge_pass import MergePass

OPTIONS_KEY = "pitome"
MAX_KEEP = "max_keep"
MEDIA_CONNECTOR = "pitome_vlm"


@dataclass(frozen=True)
class PlannedServing:
    """What a vLLM server does with the images of one model, or of one request.

    Attributes:
        model_type: of the model.
        config: the merge options in force, with `size_bias` and `positions` decided.
        shape: numbers of the vision tower.
        schedule: token counts of every image (or tile).
        patches: (rows, columns) of the tower's patches, None where images differ.
        max_keep: largest fraction of an image's tokens that a request may ask for; None for what
            `config` keeps.
    """

    model_type: str
    config: MergeConfig
    shape: TowerShape
    schedule: Schedule
    patches: tuple[int, int] | None
    max_keep: float | None = None

    @property
    def grid(self) -> tuple[int, int] | None:
        """(rows, columns) of the patches, None where the tokens are not a whole grid."""
        return self.shape.grid

    @property
    def architecture(self) -> str:
        """The plugin's class for the model."""
        return ARCHITECTURES[self.model_type]

    @property
    def kept(self) -> float:
        """The fraction of an image's tokens that is left, at most where images differ."""
        if self.config.budget.keep is not None:
            return self.config.budget.keep
        return self.schedule.tokens_out / self.schedule.tokens_in

    def exceeds(self, most: float) -> bool:
        """Whether an image may keep more than the fraction `most` of its tokens."""
        if self.kept <= most:
            return False
        # Where all images have one count, `tokens` may name the one that a fraction is rounded to.
        one_count = not (self.shape.packed or self.shape.typical)
        target = Budget(keep=most).target(self.schedule.tokens_in)
        return not one_count or self.schedule.tokens_out > (target or 0)

    @property
    def merges(self) -> bool:
        """Whether any request's images may be merged; otherwise nothing of vLLM is changed."""
        return self.max_keep is not None or not self.schedule.is_identity

    @property
    def size_bias(self) -> bool:
        """Whether attention of the language model adds log sizes."""
        return bool(self.config.size_bias) and self.merges

    @property
    def places(self) -> bool:
        """Whether tokens are told where they sit without merging."""
        return self.config.positions != "compact" and self.merges

    @property
    def is_calibrated(self) -> bool:
        """Whether the language model is told anything about merged tokens."""
        return self.size_bias or self.places

    @property
    def salt(self) -> str:
        """Hex digest of the options, to add to the name of whatever is cached of an image."""
        text = json.dumps(self.config.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def with_config(self, config: MergeConfig) -> PlannedServing:
        """The plan for a request with options of its own.

        Raises:
            ValueError: the budget does not fit the model.
        """
        from ..merge.budget import schedule_for

        _check_auto(config, self.model_type)
        schedule = schedule_for(config, self.shape)
        return dataclasses.replace(self, config=config, schedule=schedule)

    def for_pixels(self, pixels: Tensor) -> PlannedServing:
        """The plan for one image (or video), [F, 3, H, W]; another one only with keep="auto"."""
        if not self.config.by_pixels or self.patches is None:
            return self
        from ..merge.pixels import keep_of

        keep = keep_of(pixels, self.patches, self.config.keep_range)
        return self.with_config(self.config.replace(keep=keep))

    def new_pass(self) -> MergePass:
        """A fresh pass for images that are encoded together."""
        from ..merge.budget import new_pass

        return new_pass(self.config, self.schedule, self.grid)

    def overrides(self) -> dict[str, Any]:
        """What `hf_overrides` returns."""
        return _overrides(self.architecture, self.config, self.max_keep)

    def __str__(self) -> str:
        counts = f"{self.schedule.tokens_in} -> {self.schedule.counts_out}"
        unit = "tile" if self.shape.packed else "image"
        unit = "typical image" if self.shape.typical else unit
        text = f"{self.config.summary()}: {counts} visual tokens per {unit}"
        most = f", up to keep={self.max_keep} on request"
        return text if self.max_keep is None else text + most


def served_config(config: MergeConfig) -> MergeConfig:
    """A config as vLLM carries it out: the same merges, `size_bias` and `positions` decided.

    keep="auto" follows the pixels: vLLM has to know counts before the tower runs.
    """
    # Late, because it imports torch, which a process that only registers the model does not need.
    from ..merge import algorithms
    from ..merge.places import told

    bias, positions = told(config, wanted=algorithms.get(config.algorithm).calibrated)
    adapt = "pixels" if config.is_adaptive else config.adapt
    return config.replace(size_bias=bias, positions=positions, adapt=adapt)


def hf_overrides(
    config: MergeConfig,
    model: str | os.PathLike[str] | None = None,
    *,
    max_keep: float | None = None,
) -> dict[str, Any]:
    """What `LLM(hf_overrides=...)` and `vllm serve --hf-overrides` take, in plain JSON values.

    Args:
        config: the merge options; written are those that differ from their defaults, the
            algorithm and the calibration.
        model: folder or hub name of the checkpoint, whose config.json is read; None for one of
            type `llava` (LLaVA-1.5).
        max_keep: largest fraction of an image's tokens that a request may ask for, in (0, 1];
            None for what the config itself keeps.

    Raises:
        ValueError: see `plan_serving`; without `model` only what is out of range by itself.
        TypeError: a model that is not supported.
    """
    if model is not None:
        return plan_serving(config_of(model), config, max_keep=max_keep).overrides()
    return _overrides(ARCHITECTURE, served_config(config), _checked_max_keep(max_keep))


def _overrides(architecture: str, served: MergeConfig, max_keep: float | None) -> dict[str, Any]:
    options = {"algorithm": served.algorithm, **served.changed()}
    values = json.loads(json.dumps(options if max_keep is None else options | {MAX_KEEP: max_keep}))
    return {"architectures": [architecture], OPTIONS_KEY: values}


def config_of(model: str | os.PathLike[str]) -> Any:
    """The config of a checkpoint, by folder or hub name.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it cannot be read.
    """
    from transformers import AutoConfig

    from ..loading.checkpoints import existing

    # Not `read_config`: models that the library cannot wrap are refused with vLLM's reasons.
    try:
        return AutoConfig.from_pretrained(existing(str(model)))
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            raise
        raise ValueError(f"{model}: its config.json cannot be read: {error}") from error


def plan_serving(
    hf_config: Any, config: MergeConfig | None = None, *, max_keep: float | None = None
) -> PlannedServing:
    """Everything about a server's merging that is known before anything runs.

    Args:
        hf_config: the model's config; holds the options where `config` is None.
        config: the merge options, None to read what `--hf-overrides` brought.
        max_keep: as in `hf_overrides`; ignored where `config` is None.

    Raises:
        TypeError: a model or a vision tower that is not supported, or an option of a wrong type.
        ValueError: options that are missing, out of range, that do not fit the model, or that
            vLLM cannot carry out.
    """
    from ..merge.budget import schedule_for

    if config is None:
        config, max_keep = _given(hf_config)
    model, served = served_as(hf_config), served_config(config)
    _check_auto(served, hf_config.model_type)
    if model.grid_places and served.positions == "compact":
        served = _on_grids(served, config)
    shape = model.shape(hf_config)
    schedule = schedule_for(served, shape)
    most = _checked_max_keep(max_keep)
    patches = None if model.patches is None else model.patches(hf_config)
    plan = PlannedServing(hf_config.model_type, served, shape, schedule, patches, most)
    if served.compile:
        raise ValueError(
            "compile=True is not available in vLLM, where every budget that a request asks for "
            "would be compiled while all others wait; leave it out"
        )
    if most is not None and plan.exceeds(most):
        raise ValueError(
            f"{MAX_KEEP} must be at least what is kept without a request's own budget "
            f"({plan.kept:.4g}), got {most}"
        )
    if plan.is_calibrated:
        check_language_model(
            hf_config.text_config,
            size_bias=plan.size_bias,
            places=plan.places,
            sections=model.grid_places,
        )
    return plan


def _check_auto(config: MergeConfig, model_type: str) -> None:
    if config.by_pixels and SERVED[model_type].patches is None:
        raise ValueError(
            f"keep='auto' is not served for models of type {model_type!r}: no count of their "
            "tokens follows from pixels alone; give a fixed keep"
        )


def _on_grids(served: MergeConfig, asked: MergeConfig) -> MergeConfig:
    """Positions of a model that places tokens by the grid of their image."""
    if asked.positions == "compact":
        raise ValueError(
            "positions='compact' is not available for this model, which places tokens by the grid "
            "of their image; use 'mean', 'median' or 'original'"
        )
    return served.replace(positions="mean")


def _checked_max_keep(value: float | None) -> float | None:
    if value is None:
        return None
    check_range(MAX_KEEP, value, 0, 1)
    if value == 0:
        raise ValueError(f"{MAX_KEEP} must be in (0, 1], got {value!r}")
    return float(value)


def _given(hf_config: Any) -> tuple[MergeConfig, float | None]:
    values = getattr(hf_config, OPTIONS_KEY, None)
    if values is None:
        raise ValueError(
            f'hf_overrides chose an architecture of pitome_vlm but hold no "{OPTIONS_KEY}" '
            "options; `pitome-vlm serve-args PATH --keep 0.25` prints what to pass"
        )
    if not isinstance(values, Mapping):
        raise TypeError(
            f'hf_overrides["{OPTIONS_KEY}"] must be an object with fields of MergeConfig, got '
            f"{values!r}"
        )
    options = dict(values)
    max_keep = options.pop(MAX_KEEP, None)
    try:
        return MergeConfig.from_dict(options), max_keep
    except (TypeError, ValueError) as error:
        raise type(error)(f'hf_overrides["{OPTIONS_KEY}"]: {error}') from error
