"""A config on a model: its schedule, its calibration, its visual tokens.

Knows: configs, the registry of algorithms, adapters, and what of them does not fit together. Does
not know: prompts, `forward`, `generate`, or how a model gets wrapped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from . import algorithms
from .adapters import Adapter
from .calibration import Calibration, resolve
from .config import MergeConfig, Stage
from .merge_pass import MergePass, VisualTokens
from .schedule import Budget, Schedule, TowerShape, build_schedule


@dataclass(frozen=True)
class Merging:
    """What `wrap` put on a model: plain data, safe to copy and to pickle.

    Attributes:
        config: the options.
        adapter: the model family.
    """

    config: MergeConfig
    adapter: Adapter

    def schedule(self, model: Any, **feature_options: Any) -> Schedule:
        """Token counts for this model; `feature_options` are those of one call.

        Raises:
            ValueError: the budget does not fit the model.
        """
        return schedule_for(self.config, self.adapter.tower_shape(model, **feature_options))

    def calibration(self, model: Any) -> Calibration:
        """What the language model is told about merged tokens.

        Raises:
            ValueError: the config asks for what this language model cannot do.
        """
        wanted = algorithms.get(self.config.algorithm).calibrated
        return resolve(self.config, self.adapter.text_config(model), wanted=wanted)

    def encode(self, model: Any, pixel_values: Tensor, **feature_options: Any) -> VisualTokens:
        """Visual tokens of images [images, 3, H, W], merged as configured."""
        shape = self.adapter.tower_shape(model, **feature_options)
        merge_pass = MergePass(
            config=self.config,
            schedule=schedule_for(self.config, shape),
            algorithm=algorithms.get(self.config.algorithm),
            grid=shape.grid,
        )
        return self.adapter.encode_images(model, pixel_values, merge_pass, **feature_options)


def stage_of(config: MergeConfig) -> Stage:
    """Where a config merges: its own stage, else the algorithm's.

    `ratio` is about every merging layer of the tower (the paper's r), so it stays there.
    """
    default = algorithms.get(config.algorithm).default_stage
    if config.ratio is not None and default == "both":
        default = "tower"
    return config.stage or default


def schedule_for(config: MergeConfig, shape: TowerShape) -> Schedule:
    """Lay a config's budget out over a tower.

    Raises:
        ValueError: unknown algorithm, or a budget that cannot be met.
    """
    algorithm = algorithms.get(config.algorithm)
    stage = stage_of(config)
    if algorithm.one_step and stage == "both":
        raise ValueError(
            f"algorithm {algorithm.name!r} reduces in one step, so stage must be 'tower' or "
            "'projector', got 'both'"
        )
    for option, place in (("layers", "projector"), ("projector_steps", "tower")):
        if stage == place and getattr(config, option) is not None:
            raise ValueError(
                f"{option}={getattr(config, option)} has no effect at stage={stage!r}, where "
                f"{algorithm.name!r} merges here; leave it out or name another stage"
            )
    if config.is_adaptive and algorithm.one_step:
        raise ValueError(
            f"algorithm {algorithm.name!r} reduces in one step, so it cannot stop where an image "
            "stops being redundant; keep='auto' needs another algorithm, or give a fixed keep"
        )
    if algorithm.needs_attention and stage != "tower":
        raise ValueError(
            f"algorithm {algorithm.name!r} ranks tokens by attention in the vision tower, so stage "
            f"must be 'tower', got {stage!r}"
        )
    schedule = build_schedule(
        shape,
        config.budget,
        stage=stage,
        layers=config.layers,
        tower_share=config.tower_share or algorithm.tower_share,
        projector_steps=1 if algorithm.one_step else config.projector_steps,
        one_step=algorithm.one_step,
        pairwise=algorithm.pairwise,
        fewest=Budget(keep=config.keep_range[0]) if config.is_adaptive else None,
    )
    if algorithm.name == "none" and not schedule.is_identity:
        raise ValueError(
            f"algorithm 'none' keeps all {schedule.tokens_in} visual tokens, but the budget "
            f"leaves {schedule.tokens_out}; use keep=1.0 or another algorithm"
        )
    if algorithm.needs_grid and shape.grid is None and not schedule.is_identity:
        raise ValueError(
            f"algorithm {algorithm.name!r} needs the whole patch grid, but this model drops one "
            'patch (vision_feature_select_strategy="default" on a tower without a class token)'
        )
    return schedule
