"""The budget of one request: `mm_processor_kwargs={"pitome": {"keep": 0.5}}`.

What a request asks for is checked against what the server was started with, because memory was set
aside for that. The budget then travels with every image of the request, next to its pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .options import MAX_KEEP, OPTIONS_KEY, PlannedServing, served_config

# What a request may name; the algorithm only to say which one it expects.
_WORDS = ("keep", "tokens", "algorithm")
# Options of processors that the model's weights fix; with others its engine process would die.
_FIXED = ("patch_size", "temporal_patch_size", "merge_size", "image_grid_pinpoints")
# The form of what goes in and comes out.
_FORM = ("return_tensors", "input_data_format")
# Parts of a processor that have such options.
_PROCESSORS = ("image_processor", "video_processor")
# By which a processor drops frames.
_SAMPLING = ("do_sample_frames", "num_frames", "fps")
# What vLLM says where a prompt has no place for an image: it was cut off, or its template has none.
_UNPLACED = ("Failed to apply prompt replacement", "forgot to include input placeholder")


def checked(plan: PlannedServing, options: Mapping[str, Any], processor: Any) -> PlannedServing:
    """The plan for one request, all of whose options are allowed.

    Args:
        plan: the server's.
        options: the request's `mm_processor_kwargs`.
        processor: the model's.

    Raises:
        ValueError: see `requested` and `check_fixed`, or they are nested too deeply to be shown.
    """
    try:
        check_fixed(options, processor)
        return requested(plan, options.get(OPTIONS_KEY))
    except RecursionError as error:
        raise ValueError("mm_processor_kwargs are nested too deeply") from error


def requested(plan: PlannedServing, asked: Any) -> PlannedServing:
    """The plan for one request.

    Args:
        plan: the server's.
        asked: the request's options, None for none.

    Raises:
        ValueError: an option that a request cannot have, a budget that is out of range or above
            the server's, or another algorithm than the server's.
    """
    if asked is None:
        return plan
    name = f'mm_processor_kwargs["{OPTIONS_KEY}"]'
    if not isinstance(asked, Mapping):
        raise ValueError(f"{name} must be an object such as {{'keep': 0.25}}, got {asked!r:.100}")
    unknown = [word for word in asked if word not in _WORDS]
    if unknown:
        raise ValueError(
            f"{name} may hold {', '.join(_WORDS)}, got {unknown[0]!r:.100}; everything else is "
            "decided when the server starts"
        )
    budget: dict[str, Any] = {word: value for word, value in asked.items() if word != "algorithm"}
    algorithm = asked.get("algorithm", plan.config.algorithm)
    if algorithm != plan.config.algorithm:
        raise ValueError(
            f"{name}: algorithm must be this server's, {plan.config.algorithm!r}, got "
            f"{algorithm!r:.100}"
        )
    if not budget:
        return plan
    if len(budget) > 1:
        raise ValueError(f"{name}: give keep or tokens, not both")
    ((word, value),) = budget.items()
    most = plan.kept if plan.max_keep is None else plan.max_keep
    if value == "auto":
        budget["keep_range"] = tuple(min(most, one) for one in plan.config.keep_range)
    try:
        found = plan.with_config(served_config(plan.config.replace(**budget)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error
    _check_most(plan, found, f"{name}: {word}={value!r:.100}", most)
    return found


def check_fixed(options: Mapping[str, Any], processor: Any) -> None:
    """Refuse options of a request that make patches or tiles which the model cannot read.

    Args:
        options: the request's `mm_processor_kwargs`.
        processor: the model's.

    Raises:
        ValueError: one differs from the processor's own and from those of its parts.
    """
    owners = (processor, *(getattr(processor, name, None) for name in _PROCESSORS))
    for name, value in _each(options):
        if name in _FORM:
            raise ValueError(
                f"mm_processor_kwargs: {name}={value!r:.100} cannot be set, because pixels would "
                "have another form than the model reads; leave it out"
            )
        found = [getattr(owner, name, None) for owner in owners if name in _FIXED]
        own = [one for one in found if one is not None]
        if own and value not in own:
            raise ValueError(
                f"mm_processor_kwargs: {name} must be {own[0]!r:.100}, which the model was trained "
                f"with, got {value!r:.100}"
            )


def _each(options: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every option, also those for one part of the processor (`images_kwargs`)."""
    for name, value in options.items():
        if isinstance(value, Mapping) and name.endswith("_kwargs"):
            yield from value.items()
        else:
            yield name, value


def blamed(error: Exception, options: Mapping[str, Any]) -> str | None:
    """What to tell a client whose request cannot be processed; None where it is the server's fault.

    Args:
        error: that processing ended with.
        options: the request's `mm_processor_kwargs`.
    """
    said = " ".join(str(error).split())
    if any(words in said for words in _UNPLACED):
        return f"the prompt must hold a place for every image and video: {said:.300}"
    if options:
        names = ", ".join(map(str, options))
        return (
            f"mm_processor_kwargs: images and videos cannot be processed with {names:.100}, leave "
            f"it out ({type(error).__name__}: {said:.300})"
        )
    return None


def check_frames(given: int, left: int, options: Mapping[str, Any]) -> None:
    """Refuse videos that lose frames: vLLM counts those that came in.

    Args:
        given: frames that came in.
        left: frames that the processor made of them.
        options: the request's `mm_processor_kwargs`.

    Raises:
        ValueError: the counts differ.
    """
    if left == given:
        return
    asked = [name for name, _ in _each(options) if name in _SAMPLING]
    if asked:
        raise ValueError(
            f"mm_processor_kwargs: a video must keep its {given} frames, got {left}; leave out "
            f"{', '.join(asked)}"
        )
    raise ValueError(
        f"this server's processor makes {left} frames of a video of {given}, which must keep them; "
        "set do_sample_frames to false in the checkpoint's processor configuration"
    )


def check_side(pixels: Tensor, side: Any) -> None:
    """Refuse images that a request's options brought to a size which the model cannot read.

    Args:
        pixels: of an image, tile or frames, [..., 3, H, W]; of patches, [n, C], any will do.
        side: `image_size` of the model's tower: one number, (H, W), or None for any.

    Raises:
        ValueError: they have another size, are not finite, or none of them are there.
    """
    if pixels.is_meta:
        # Engines in processes of their own never get them, and the request would wait for ever.
        raise ValueError("mm_processor_kwargs: device='meta' holds no pixels; leave it out")
    if pixels.is_floating_point() and not bool(pixels.isfinite().all()):
        # Blocks of the cache that hold them would be read again for other requests.
        raise ValueError(
            "mm_processor_kwargs: pixels must be finite; leave out rescale_factor, image_mean and "
            "image_std"
        )
    if side is None or pixels.ndim < 3:
        return
    high, wide = (side, side) if isinstance(side, int) else side
    if tuple(pixels.shape[-2:]) != (high, wide):
        raise ValueError(
            f"mm_processor_kwargs: images or their tiles must become {high} x {wide} pixels, which "
            f"the model was trained with, got {' x '.join(map(str, pixels.shape[-2:]))}; leave out "
            "size, crop_size and do_resize"
        )


def _check_most(plan: PlannedServing, found: PlannedServing, asked: str, most: float) -> None:
    if not plan.merges and not found.schedule.is_identity:
        raise ValueError(
            f"{asked}, but this server was started with keep=1, which leaves vLLM as it is; start "
            f"it with {MAX_KEEP}=1 to allow smaller budgets"
        )
    if found.exceeds(most):
        raise ValueError(
            f"{asked} keeps {found.kept:.4g} of an image's visual tokens, this server at most "
            f"{most:.4g}; ask for less, or start it with a larger {MAX_KEEP}"
        )


def largest(plan: PlannedServing) -> dict[str, Any] | None:
    """The largest budget that a request may ask for, None for the server's own."""
    if plan.max_keep is None and not plan.config.by_pixels:
        return None
    return {"keep": plan.kept if plan.max_keep is None else plan.max_keep}


def as_numbers(plan: PlannedServing, full: int) -> Tensor:
    """What travels with an image: (tokens without merging, keep or 0, tokens or 0), [3] float64."""
    return torch.tensor([full, *_numbers(plan)], dtype=torch.float64)


def from_numbers(plan: PlannedServing, keep: float, tokens: float) -> PlannedServing:
    """The plan that `as_numbers` was made of."""
    if not plan.config.is_adaptive and (keep, tokens) == _numbers(plan):
        return plan
    changes = {"tokens": int(tokens)} if tokens else {"keep": keep}
    return plan.with_config(plan.config.replace(**changes))


def _numbers(plan: PlannedServing) -> tuple[float, float]:
    budget = plan.config.budget
    return budget.keep or 0.0, budget.tokens or 0.0
