"""From a config and the numbers of a tower to a schedule and a pass; bad combinations are refused.

Handles: configs and the registry of algorithms. Leaves to adapters: models; a tower is a
`TowerShape` here.
"""

from __future__ import annotations

from . import algorithms
from .algorithm import Algorithm, MergeContext
from .config import MergeConfig, Stage
from .merge_pass import MergePass, Watch
from .schedule import Schedule, TowerShape, build_schedule
from .steps import Budget

# Brings a packed image to its exact count where the algorithm works inside the tower only.
FINISHER = "tome"


def stage_of(config: MergeConfig, algorithm: Algorithm | None = None) -> Stage:
    """Where a config merges: its own stage, else the algorithm's.

    `ratio` is about every merging layer of the tower (the paper's r), so it stays there.
    """
    default = (algorithm or algorithms.get(config.algorithm)).default_stage
    if config.ratio is not None and default == "both":
        default = "tower"
    return config.stage or default


def schedule_for(
    config: MergeConfig, shape: TowerShape, algorithm: Algorithm | None = None
) -> Schedule:
    """Lay a config's budget out over a tower.

    Args:
        config: the merge options.
        shape: the tower.
        algorithm: the one that the config names, None to look it up.

    Raises:
        ValueError: unknown algorithm, or a budget that cannot be met.
    """
    algorithm = algorithm or algorithms.get(config.algorithm)
    stage = _stage_in(config, algorithm, shape)
    _check_stage(config, algorithm, shape, stage)
    schedule = build_schedule(
        shape,
        config.budget,
        stage=stage,
        layers=config.layers,
        tower_share=config.tower_share or algorithm.tower_share,
        projector_steps=1 if algorithm.one_step else config.projector_steps,
        one_step=algorithm.one_step,
        few=algorithm.few_layers and stage == "both",
        pairwise=algorithm.pairwise,
        fewest=Budget(keep=config.keep_range[0]) if config.is_adaptive else None,
        after_layer=config.placement == "after_layer",
        counts_leading=lambda layer, depth: algorithm.counts_leading(
            MergeContext(config, layer, depth)
        ),
    )
    _check_schedule(schedule, algorithm, shape, stage)
    if config.by_pixels:
        # Every image gets a budget of its own, the smallest of which has to fit as well.
        schedule_for(config.replace(keep=config.keep_range[0]), shape, algorithm)
    return schedule


def _stage_in(config: MergeConfig, algorithm: Algorithm, shape: TowerShape) -> Stage:
    """Where a config merges in a tower."""
    if shape.projector_only:
        if config.stage in ("tower", "both") or config.ratio is not None:
            asked = f"stage={config.stage!r}" if config.stage else f"ratio={config.ratio}"
            raise ValueError(
                f"{asked} merges inside the vision tower, which this model cannot; use "
                'stage="projector" with keep or tokens'
            )
        return "projector"
    if shape.tower_only:
        return _inside_only(config)
    return stage_of(config, algorithm)


def _check_stage(
    config: MergeConfig, algorithm: Algorithm, shape: TowerShape, stage: Stage
) -> None:
    """Refuse options and algorithms that do not go with where tokens merge."""
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
    if config.compile and (stage == "projector" or shape.typical):
        where = "after the tower only" if stage == "projector" else "in images of any size"
        raise ValueError(
            "compile=True compiles merging inside a tower that sees images of one size, but "
            f"{algorithm.name!r} merges {where} here; leave it out"
        )
    if config.is_adaptive and algorithm.one_step and not config.by_pixels:
        raise ValueError(
            f"algorithm {algorithm.name!r} reduces in one step, so it cannot stop where an image "
            "stops being redundant; keep='auto' needs another algorithm or adapt='pixels', or give "
            "a fixed keep"
        )
    if algorithm.needs_attention and stage != "tower":
        raise ValueError(
            f"algorithm {algorithm.name!r} ranks tokens by attention in the vision tower, so stage "
            f"must be 'tower', got {stage!r}"
        )
    if config.is_adaptive and algorithm.needs_attention and not shape.packed:
        raise ValueError(
            f"algorithm {algorithm.name!r} ranks tokens by attention in the vision tower, so it "
            "cannot go on after it until an image stops being redundant; keep='auto' needs another "
            "algorithm, or give a fixed keep"
        )


def _check_schedule(
    schedule: Schedule, algorithm: Algorithm, shape: TowerShape, stage: Stage
) -> None:
    """Refuse algorithms that cannot do what a schedule asks for."""
    if algorithm.name == "none" and not schedule.is_identity:
        raise ValueError(
            f"algorithm 'none' keeps all {schedule.tokens_in} visual tokens, but the budget "
            f"leaves {schedule.tokens_out}; use keep=1.0 or another algorithm"
        )
    if algorithm.needs_grid and shape.packed and stage != "projector":
        raise ValueError(
            f"algorithm {algorithm.name!r} needs whole grids; where an image is several tiles "
            f"these are only known after the projector, so stage must be 'projector', got "
            f"{stage!r}"
        )
    gridless = shape.grid is None and not shape.packed
    if algorithm.needs_grid and gridless and shape.tower_only and not schedule.is_identity:
        raise ValueError(
            f"algorithm {algorithm.name!r} needs the whole patch grid, but this encoder reads its "
            "patches in random order"
        )
    if algorithm.needs_grid and gridless and not schedule.is_identity:
        raise ValueError(
            f"algorithm {algorithm.name!r} needs the whole patch grid, but this model drops one "
            'patch (vision_feature_select_strategy="default" on a tower without a class token)'
        )


def _inside_only(config: MergeConfig) -> Stage:
    """The stage of an encoder on its own."""
    if config.stage not in (None, "tower"):
        raise ValueError(
            f"stage must be 'tower' for an encoder on its own, after which nothing reads fewer "
            f"tokens, got {config.stage!r}"
        )
    if config.is_adaptive:
        raise ValueError(
            "keep='auto' decides after the tower, so an encoder on its own needs a fixed budget; "
            "give keep=0.5, tokens or ratio"
        )
    return "tower"


def new_pass(
    config: MergeConfig,
    schedule: Schedule,
    grid: tuple[int, int] | None,
    *,
    algorithm: Algorithm | None = None,
    watch: Watch | None = None,
) -> MergePass:
    """A fresh pass for one encoding.

    Args:
        config: the merge options.
        schedule: of `schedule_for`.
        grid: (rows, columns) of the patches, None where the tokens are no whole grid.
        algorithm: the one that the config names, None to look it up.
        watch: see `MergePass`.
    """
    algorithm = algorithm or algorithms.get(config.algorithm)
    finisher = algorithms.get(FINISHER) if algorithm.needs_attention else None
    return MergePass(config, schedule, algorithm, grid, finisher, watch=watch)
