"""wrap, unwrap, wrapped: join a model, an adapter and a merge config.

Merging is put on a model all-or-nothing and taken off without a trace. What happens in a forward
pass is left to `forward.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import nn

from ..adapters import Adapter, find_adapter
from ..adapters.swap import is_swapped, swap_in, swap_out
from ..adapters.tower import InTower
from ..adapters.wide_attention import install_wide, uninstall_wide
from ..merge.budget import stage_of
from ..merge.config import CONFIG_NAME, MergeConfig
from ..merge.merge_pass import Watch
from ..merge.schedule import Schedule
from .encoder import put_on, take_off
from .forward import WrappedLlava
from .merging import STATE, Merging
from .original import WrappedOriginalLlava
from .peft import WrappedPeft, can_remember

Model = TypeVar("Model", bound=nn.Module)

# What is put before a model's class, by the calling convention that its adapter names.
MIXINS: dict[str, type] = {"transformers": WrappedLlava, "original": WrappedOriginalLlava}


def wrap(
    model: Model,
    *unnamed: Any,
    keep: float | None = None,
    tokens: int | None = None,
    ratio: float | None = None,
    config: MergeConfig | None = None,
    **options: Any,
) -> Model:
    """Merge the visual tokens of a model before its language model sees them; in place.

    Plain encoders (CLIP, SigLIP, ViT, DeiT, MAE, DINO, BLIP) merge inside and hand every patch the
    value of its group after their last layer, so that their output keeps its length.

    The processor, `generate`, `Trainer`, PEFT and accelerate are used as before. Wrapping again
    replaces the settings. Weights, `state_dict` keys and class names are untouched.

    Args:
        model: a LLaVA of transformers or of the original llava package (docs/models.md lists
            them) or an encoder (docs/encoders.md), on its own or inside a `PeftModel`.
        *unnamed: nothing; budgets and options are given by name.
        keep: fraction of an image's visual tokens to keep, in (0, 1]; 1.0 changes nothing. Of an
            encoder, of its tokens after the last layer, class token included.
        tokens: the same as a count per image; per tile for models that cut images into tiles.
        ratio: the paper's r, the fraction kept at every merging layer.
        config: a ready `MergeConfig`; a budget or options given with it replace its own.
        **options: fields of `MergeConfig`, for instance `algorithm="tome"`.

    Returns:
        The same object.

    Raises:
        TypeError: not a supported model, or an option of the wrong type.
        ValueError: an option out of range, or a budget that does not fit the model. The model is
            unchanged after any error.
    """
    _refuse_container(base_model(model))
    _refuse_unnamed(unnamed)
    config = make_config(config, keep=keep, tokens=tokens, ratio=ratio, **options)
    base = base_model(model)
    merging = Merging(config, find_adapter(base))
    plan = merging.plan(base)
    merging = dataclasses.replace(merging, carrier=plan.calibration.carrier)
    fresh = not is_wrapped(base)
    if fresh:
        _refuse_shared(base)
    try:
        merging.adapter.install(base, inside_tower=stage_of(config, plan.algorithm) != "projector")
        if merging.carrier == "channels":
            install_wide(base, merging.adapter.text_config(base))
        if merging.adapter.calls == "encoder":
            put_on(base)
        else:
            swap_in(base, MIXINS[merging.adapter.calls])
        if can_remember(model):
            # From now on what is saved of a PeftModel says how it was merged.
            swap_in(model, WrappedPeft)
    except BaseException:
        if fresh:
            swap_out(base)
            _uninstall(merging.adapter, base)
        raise
    base.__dict__[STATE] = merging
    return model


def unwrap(model: Model) -> Model:
    """Take merging off; the model is as it was before `wrap`. A no-op on an unwrapped model."""
    base = base_model(model)
    if is_wrapped(base):
        swap_out(base)
        _uninstall(base.__dict__.pop(STATE).adapter, base)
    if model is not base:
        swap_out(model)
    return model


def _uninstall(adapter: Adapter, base: nn.Module) -> None:
    adapter.uninstall(base)
    uninstall_wide(base)
    take_off(base)


@contextlib.contextmanager
def wrapped(
    model: Model,
    *unnamed: Any,
    keep: float | None = None,
    tokens: int | None = None,
    ratio: float | None = None,
    config: MergeConfig | None = None,
    **options: Any,
) -> Iterator[Model]:
    """`wrap` for the length of a `with` block; what was on before comes back, error or not."""
    _refuse_unnamed(unnamed)
    previous = merge_config(model) if is_wrapped(model) else None
    wrap(model, keep=keep, tokens=tokens, ratio=ratio, config=config, **options)
    try:
        yield model
    finally:
        unwrap(model) if previous is None else wrap(model, config=previous)


@contextlib.contextmanager
def unwrapped(model: Model) -> Iterator[Model]:
    """`unwrap` for the length of a `with` block; what was on before comes back, error or not."""
    previous = merge_config(model) if is_wrapped(model) else None
    unwrap(model)
    try:
        yield model
    finally:
        if previous is not None:
            wrap(model, config=previous)


def _refuse_shared(base: nn.Module) -> None:
    """Leave layers alone that merge for another model, which they are a part of or contain."""
    if any(isinstance(module, InTower) for module in base.modules()):
        raise ValueError(
            f"layers of this {type(base).__name__} merge already, because a part of it or a model "
            "around it is wrapped; unwrap that first"
        )


def _refuse_unnamed(unnamed: tuple[Any, ...]) -> None:
    if unnamed and isinstance(unnamed[0], MergeConfig):
        raise TypeError("give the config by name: wrap(model, config=...)")
    if unnamed:
        word = "tokens" if isinstance(unnamed[0], int) and unnamed[0] > 1 else "keep"
        raise TypeError(f"give the budget by name: wrap(model, {word}={unnamed[0]!r})")


def _refuse_container(model: Any) -> None:
    """Say which part of an object to wrap, where it is something around a model."""
    kind = type(model).__name__
    if hasattr(model, "_orig_mod"):
        raise TypeError(
            "wrap() the model first and compile it then; the model inside this compiled one is "
            "model._orig_mod"
        )
    if isinstance(getattr(model, "module", None), nn.Module):
        raise TypeError(f"{kind} is a container: wrap the model inside, wrap(model.module, ...)")
    if not isinstance(model, nn.Module) and isinstance(getattr(model, "model", None), nn.Module):
        raise TypeError(f"{kind} is not a model: wrap the one inside, wrap(pipeline.model, ...)")


def make_config(config: MergeConfig | None = None, **options: Any) -> MergeConfig:
    """A `MergeConfig` from an existing one and changes to it; None means not given.

    Raises:
        TypeError: `config` is no MergeConfig.
        ValueError: see `MergeConfig`; unknown options are named with the closest known one.
    """
    given = {name: value for name, value in options.items() if value is not None}
    for name in ("format_version", "pitome_vlm_version"):
        if name in given:
            raise ValueError(f"{name} is set in {CONFIG_NAME} and cannot be passed to wrap()")
    if config is None:
        return MergeConfig.from_dict(given)
    if not isinstance(config, MergeConfig):
        raise TypeError(f"config must be a MergeConfig, got {type(config).__name__}")
    return config.replace(**given)


def base_model(model: nn.Module) -> nn.Module:
    """The model inside a `PeftModel`, or the model itself."""
    if hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
        inner: nn.Module = model.get_base_model()  # type: ignore[operator]
        return inner
    return model


def is_wrapped(model: nn.Module) -> bool:
    """Whether `wrap` is in force on this model."""
    base = base_model(model)
    return isinstance(base, nn.Module) and is_swapped(base) and STATE in base.__dict__


def merging_of(model: nn.Module) -> tuple[nn.Module, Merging]:
    """The wrapped model itself and what is on it.

    Raises:
        ValueError: the model is not wrapped.
    """
    base = base_model(model)
    if not is_wrapped(base):
        raise ValueError(
            f"{type(base).__name__} is not wrapped; call pitome_vlm.wrap(model, keep=0.25) first"
        )
    return base, base.__dict__[STATE]


@contextlib.contextmanager
def observed(model: nn.Module, watch: Watch) -> Iterator[None]:
    """Let `watch` measure the parts of every encoding for the length of a block.

    Args:
        model: a wrapped model.
        watch: see `Merging`.

    Raises:
        ValueError: the model is not wrapped.
    """
    base, merging = merging_of(model)
    base.__dict__[STATE] = dataclasses.replace(merging, watch=watch)
    try:
        yield
    finally:
        if is_wrapped(base):
            base.__dict__[STATE] = merging


def merge_config(model: nn.Module) -> MergeConfig:
    """The settings in force.

    Raises:
        ValueError: the model is not wrapped.
    """
    return merging_of(model)[1].config


def schedule_of(model: nn.Module) -> Schedule:
    """Token counts layer by layer, known without running anything.

    Raises:
        ValueError: the model is not wrapped.
    """
    base, merging = merging_of(model)
    return merging.plan(base).schedule
