"""Models and pictures for the commands, loaded without noise.

Knows: how the options of the command line map onto `load` and `wrap`. Does not know: what is done
with the model afterwards. Torch is imported when something is loaded, not before.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..demo import DEMO as DEMO
from ..demo import resolve
from .options import LoadOptions
from .terminal import quiet


def model_path(name: str) -> str:
    """The folder of the bundled model for `demo`, else the name itself."""
    return str(resolve(name))


def load_model(
    options: LoadOptions, merging: dict[str, Any], *, verbose: bool = False
) -> tuple[Any, Any]:
    """(model, processor), wrapped as asked.

    Args:
        options: what to load and how.
        merging: see `MergeOptions.given`; empty leaves it to the checkpoint.
        verbose: let the libraries talk.
    """
    with quiet(verbose):
        from ..loading.models import load

        check_algorithm(merging)
        model, processor = load(
            model_path(options.model),
            load_in_4bit=options.load_4bit,
            load_in_8bit=options.load_8bit,
            dtype=options.dtype,
            device_map=options.device or accelerator(),
            **merging,
        )
    return model, processor


def check_algorithm(merging: dict[str, Any]) -> None:
    """Refuse an unknown algorithm before a large checkpoint is read.

    Raises:
        ValueError: there is none of that name.
    """
    from ..merge import algorithms

    if "algorithm" in merging:
        algorithms.get(merging["algorithm"])


def accelerator() -> str | None:
    """The device there is beside the CPU."""
    import torch

    device = torch.accelerator.current_accelerator(check_available=True)
    return None if device is None else str(device)


def load_images(paths: Sequence[Path | str]) -> list[Image.Image]:
    """Pictures from files, within the limits of `loading.ImageLimits`."""
    from ..loading.images import load_image

    return [load_image(path) for path in paths]


def merging_line(model: Any) -> str:
    """What is merged, in one line."""
    from ..wrapping.wrap import is_wrapped, merge_config, merging_of

    if not is_wrapped(model):
        return "no merging"
    base, merging = merging_of(model)
    schedule, unit = merging.plan(base).schedule, merging.adapter.counted_per
    name = merge_config(model).algorithm
    return f"{name}: {schedule.tokens_in} -> {schedule.counts_out} visual tokens per {unit}"
