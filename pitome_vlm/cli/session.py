"""Models and images for the commands, loaded without noise.

Maps the options of the command line onto `load` and `wrap`. Torch is imported when something is
loaded, not before.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common import require
from ..merge.config import BUDGET_WORDS, DEFAULT_KEEP, MergeConfig
from .terminal import loading, quiet, say

if TYPE_CHECKING:
    from PIL import Image

DEMO = "demo"  # as in `pitome_vlm.demo`, whose import is too slow for --help


def model_path(name: str) -> str:
    """The folder of the bundled model for `demo`, else the name itself."""
    from ..demo import resolve

    return str(resolve(name))


def planned_config(
    model: str, given: dict[str, Any], *, base: str | None = None
) -> tuple[MergeConfig, str]:
    """What is merged, and where its budget comes from ("" for the command line).

    The command line wins over the checkpoint's own pitome_config.json, and that over the default.
    `base` is the base model of an adapter, where it is not where it was.
    """
    from ..loading.checkpoints import only_local
    from ..wrapping.wrap import make_config

    check_algorithm(given)
    path = model_path(model)
    local = only_local(path)
    options, origin = dict(given), ""
    preset = options.pop("preset", None)
    # A preset stands for all options; nothing of what was saved goes into it.
    saved = None if preset else _saved_config(path, base, local)
    if not options.keys() & set(BUDGET_WORDS) and options.get("algorithm") != "none":
        if saved is None:
            options["keep"], origin = DEFAULT_KEEP, "default"
        else:
            origin = "from the checkpoint's pitome_config.json"
    if preset:
        return MergeConfig.preset(preset, **options), origin
    return make_config(saved, **options), origin


def _saved_config(path: str, base: str | None, local: bool) -> MergeConfig | None:
    """The merge config of a checkpoint; that of an adapter's base where the adapter has none."""
    from ..loading.checkpoints import existing
    from ..loading.models import saved_merge_config
    from ..loading.peft import find_adapter_at

    if Path(path).is_file():  # a config.json alone
        return None
    adapter = find_adapter_at(path, local_files_only=local)
    name = existing(path) if adapter is None else adapter.path
    saved = saved_merge_config(name, local_files_only=local)
    if saved is None and adapter is not None:
        return saved_merge_config(adapter.base(base), local_files_only=local)
    return saved


def load_model(
    name: str,
    *,
    load_4bit: bool = False,
    load_8bit: bool = False,
    dtype: str | None = None,
    device: str | None = None,
    config: MergeConfig | None = None,
    verbose: bool = False,
    encoders: bool = False,
    **more: Any,
) -> tuple[Any, Any]:
    """(model, processor) of a path, a hub name or `demo`; without a config, wrapped as saved.

    Without a device it goes to the accelerator, if there is one; `encoders` on their own are
    refused unless a command can do with one; `more` is passed to `loading.load`.
    """
    check_bits(load_4bit, load_8bit)
    with quiet(verbose):
        from ..loading.encoders import refuse_encoder
        from ..loading.models import load

        if not encoders:
            refuse_encoder(model_path(name))
        chosen = checked_device(device) or accelerator()
        loading(f"the model from {name}" if name != DEMO else "the bundled model")
        model, processor = load(
            model_path(name),
            load_in_4bit=load_4bit,
            load_in_8bit=load_8bit,
            dtype=dtype,
            device_map=chosen,
            config=config,
            **more,
        )
    return model, processor


def load_merging(
    name: str,
    given: dict[str, Any],
    *,
    announce: bool = False,
    verbose: bool = False,
    **options: Any,
) -> tuple[Any, Any]:
    """(model, processor) with merging on; says what is merged where no budget was given.

    With `announce` or `verbose` it says so in any case; `options` are those of `load_model`.
    """
    with quiet(verbose):
        config, origin = planned_config(name, given)
    model, processor = load_model(name, config=config, verbose=verbose, **options)
    if origin or verbose or announce:
        say(merging_line(model, origin))
    return model, processor


def check_algorithm(given: dict[str, Any]) -> None:
    """Refuse an unknown algorithm before a large checkpoint is read."""
    from ..merge import algorithms

    if "algorithm" in given:
        algorithms.get(given["algorithm"])


def check_output(folder: Path, files: Sequence[str], *, overwrite: bool, plot: str = "") -> None:
    """Refuse, before anything is loaded, files that could not be written afterwards.

    `plot` is the command whose plot is drawn, empty for none.
    """
    from ..measure.store import check_files

    if plot:
        require("matplotlib", "viz", f"the plot of {plot} (--no-plot leaves it out)")
    check_files(folder, files, overwrite=overwrite)


def check_bits(load_4bit: bool, load_8bit: bool) -> None:
    """Refuse `--load-4bit` with `--load-8bit`."""
    if load_4bit and load_8bit:
        raise ValueError("only one of --load-4bit and --load-8bit can be given")


def checked_device(name: str | None) -> str | None:
    """The name of a device, once torch finds it on this machine."""
    import torch

    if name is None or name == "auto":
        return name
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(
            f"--device must be cpu, cuda, cuda:1, mps or the like, got {name!r}"
        ) from None
    if device.type == "meta":
        raise ValueError("--device meta holds no weights; give cpu, cuda, mps or the like")
    if device.type == "cpu":
        return name
    there = torch.accelerator.current_accelerator(check_available=True)
    if there is None or there.type != device.type:
        has = "no accelerator" if there is None else f"{there.type} only"
        raise ValueError(
            f"--device {name}: PyTorch finds {has} on this machine; use --device "
            f"{'cpu' if there is None else there.type}, or leave --device out"
        )
    if device.index is not None and device.index >= torch.accelerator.device_count():
        count = torch.accelerator.device_count()
        raise ValueError(f"--device {name}: this machine has {count}, numbered from 0")
    return name


def accelerator() -> str | None:
    """The accelerator of this machine, None where there is only the CPU."""
    import torch

    device = torch.accelerator.current_accelerator(check_available=True)
    return None if device is None else str(device)


def load_images(paths: Sequence[Path | str]) -> list[Image.Image]:
    """Images from files, within the limits of `loading.ImageLimits`."""
    from ..loading.images import load_image

    return [load_image(path) for path in paths]


def merging_line(model: Any, origin: str = "") -> str:
    """What is merged, in one line; `origin` says where the budget comes from."""
    from ..wrapping.wrap import is_wrapped, merge_config, merging_of

    if not is_wrapped(model):
        return "No merging"
    base, merging = merging_of(model)
    schedule, unit = merging.plan(base).schedule, merging.adapter.counted_per
    tokens = f"{schedule.tokens_in} -> {schedule.counts_out} visual tokens per {unit}"
    config = merge_config(model)
    if schedule.is_identity:
        return f"No merging: {tokens}"
    return f"Merging with {summary(config, origin)}: {tokens}"


def summary(config: MergeConfig, origin: str = "") -> str:
    """A config in one line; `origin`, where there is one, is said of its budget alone."""
    text = config.summary()
    if not origin:
        return text
    ((name, value),) = ((k, v) for k, v in config.changed().items() if k in BUDGET_WORDS)
    rest = text.replace(f" {name}={value}", "", 1)
    return f"{name}={value} ({origin}), {rest}"


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread.

    Threads that wait for each other slow a model as small as the bundled one down many times over
    on a busy machine, and make times incomparable.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def is_first_process() -> bool:
    """Whether this process speaks and writes; torchrun and accelerate set RANK."""
    return os.environ.get("RANK", "0") == "0"
