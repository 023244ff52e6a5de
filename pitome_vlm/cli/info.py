"""`pitome-vlm info`: what merging would do to a model, computed from its configuration.

Knows: its options. Does not know: any formula (`pitome_vlm.measure`). No weights are loaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..merge.config import CONFIG_NAME, MergeConfig
from . import options as o
from .terminal import quiet, write

if TYPE_CHECKING:
    from ..measure.description import Description


def info(
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            metavar="PATH",
            help="Folder, config.json or Hub name of a LLaVA, or `demo`.",
        ),
    ],
    keep: o.Keep = None,
    tokens: o.Tokens = None,
    ratio: o.Ratio = None,
    algorithm: o.Algorithm = None,
    preset: o.Preset = None,
    quality: o.Quality = None,
    text_tokens: Annotated[
        int, typer.Option(min=0, help="Length of the prompt beside the picture.")
    ] = 64,
    image_size: Annotated[
        str | None,
        typer.Option(
            metavar="WIDTHxHEIGHT",
            help="Size of the picture in pixels, for models that cut pictures into tiles; default "
            "1024x768.",
        ),
    ] = None,
    frames: Annotated[
        int | None, typer.Option(min=1, help="Describe a video of so many frames instead.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
) -> None:
    """Show tokens per layer, FLOPs and KV cache with and without merging; loads no weights.

    Without a budget: what the checkpoint's own pitome_config.json says, else a quarter is kept.

    Examples: `pitome-vlm info --model demo --tokens 36`,
    `pitome-vlm info --model llava-hf/llava-v1.6-mistral-7b-hf --keep 0.25 --image-size 1024x768`
    """
    del debug  # read by the command group
    merging = o.MergeOptions(keep, tokens, ratio, algorithm, preset, quality).given()
    with quiet(verbose):
        description = _described(model, merging, text_tokens, parsed_size(image_size), frames)
    write(json.dumps(description.to_dict(), indent=2) if as_json else str(description))


def parsed_size(text: str | None) -> tuple[int, int] | None:
    """(height, width) of a size that people write as "1024x768".

    Raises:
        ValueError: it is none.
    """
    if text is None:
        return None
    parts = [part.strip() for part in text.lower().split("x")]
    numbers = [int(part) for part in parts if part.isascii() and part.isdigit()]
    if len(parts) != 2 or len(numbers) != 2 or min(numbers) < 1:
        raise ValueError(
            f"image-size must be WIDTHxHEIGHT in whole pixels, such as 1024x768, got {text!r}"
        )
    width, height = numbers
    return height, width


def _described(
    model: str,
    merging: dict[str, Any],
    text_tokens: int,
    image_size: tuple[int, int] | None,
    frames: int | None,
) -> Description:
    from ..measure.description import from_config
    from ..wrapping.wrap import make_config
    from .session import check_algorithm

    check_algorithm(merging)
    source, saved = _source(model)
    if "config" in merging:  # a preset; nothing of what was saved goes into it
        saved, merging = None, dict(merging)
    config = make_config(merging.pop("config", saved), **merging) if saved or merging else None
    return from_config(
        source, config, text_tokens=text_tokens, image_size=image_size, frames=frames
    )


def _source(model: str) -> tuple[Any, MergeConfig | None]:
    """What `from_config` takes, and the merge config saved beside it."""
    from transformers import AutoConfig

    from ..loading.peft import find_adapter_at
    from .session import model_path

    name = model_path(model)
    path = Path(name)
    if path.is_file():
        return AutoConfig.from_pretrained(name), None
    saved = (path / CONFIG_NAME).is_file()
    adapter = find_adapter_at(name)
    if adapter is not None:
        name = adapter.base(None)
    return name, MergeConfig.from_pretrained(path) if saved else None
