"""`pitome-vlm info`: what merging would do to a model, computed from its configuration alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as o
from .terminal import quiet, say, show_table, write, write_json
from .videos import Temporal

if TYPE_CHECKING:
    from ..measure.described import Description
    from ..measure.encoders import EncoderDescription


def _list_algorithms(wanted: bool) -> None:
    if not wanted:
        return
    with quiet():
        from ..merge import algorithms

    known = [algorithms.get(name) for name in algorithms.available()]
    rows = [[one.name, one.source] for one in known]
    show_table("Merging algorithms", ["name", "source"], rows, left=(0, 1), folds=(1, 40))
    raise typer.Exit


ModelName = Annotated[
    str, o.model_option("Folder, config.json or Hub name of a checkpoint, or `demo`.")
]
TextTokens = Annotated[int, o.plain("Text tokens in the prompt.", "N", min=0)]
Frames = Annotated[
    int | None, o.plain("Describe a video of N frames instead of an image.", "N", min=1)
]
ListAlgorithms = Annotated[
    bool,
    o.plain(
        "List all merging algorithms and exit.",
        None,
        "--list-algorithms",
        callback=_list_algorithms,
        is_eager=True,
    ),
]


def info(
    model: ModelName,
    merging: o.Merging = o.Merging(),
    text_tokens: TextTokens = 64,
    image_size: o.ImageSize = None,
    frames: Frames = None,
    temporal: Temporal = False,
    list_algorithms: ListAlgorithms = False,
    as_json: o.AsJson = False,
    verbose: o.Verbose = False,
) -> None:
    """Show tokens per layer, FLOPs and KV cache with and without merging; loads no weights.

    Without a budget, a quarter of the visual tokens is kept, or what the checkpoint's own
    pitome_config.json says.

    Example: `pitome-vlm info --model llava-hf/llava-v1.6-mistral-7b-hf --image-size 1024x768`
    """
    del list_algorithms  # handled by its callback, before anything else
    given = merging.given()
    if temporal and frames is None:
        raise ValueError("--temporal merges frames of a video; give their number with --frames")
    given |= {"temporal": True} if temporal else {}
    size = o.image_size_of(image_size)
    with quiet(verbose):
        description, origin = _described(model, given, text_tokens, size, frames)
    if origin:
        from .session import summary

        say(f"Merging with {summary(description.config, origin)}")
    if as_json:
        write_json(description.to_dict())
    else:
        # On the command line nothing is ever in force, which goes without saying.
        write(str(dataclasses.replace(description, wrapped=True)))


def _described(
    model: str,
    given: dict[str, Any],
    text_tokens: int,
    image_size: tuple[int, int] | None,
    frames: int | None,
) -> tuple[Description | EncoderDescription, str]:
    from ..measure.description import from_config
    from .session import planned_config

    config, origin = planned_config(model, given)
    source = _source(model)
    description = from_config(
        source, config, text_tokens=text_tokens, image_size=image_size, frames=frames
    )
    return description, origin


def _source(model: str) -> Any:
    """What `from_config` takes: a config, or the folder or hub name of a base model."""
    from transformers import AutoConfig

    from ..loading.peft import find_adapter_at
    from .session import model_path

    name = model_path(model)
    if Path(name).is_file():
        return AutoConfig.from_pretrained(name)
    adapter = find_adapter_at(name)
    return name if adapter is None else adapter.base(None)
