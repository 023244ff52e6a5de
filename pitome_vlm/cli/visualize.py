"""`pitome-vlm visualize`: which patches of a picture became one token.

Knows: its options. Does not know: how groups are found or drawn (`pitome_vlm.measure.visualize`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..merge.config import MergeConfig
from . import options as o
from .terminal import quiet, say, write

if TYPE_CHECKING:
    from PIL import Image

COMPARED = ("pitome_plus", "pitome", "tome", "random", "pool")
DEFAULT_KEEP = 0.25


def visualize(
    model: o.Model,
    image: Annotated[Path, typer.Option("--image", "-i", metavar="FILE", help="A picture.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Where to write the picture.")
    ] = Path("overlay.png"),
    keep: o.Keep = None,
    tokens: o.Tokens = None,
    ratio: o.Ratio = None,
    algorithm: o.Algorithm = None,
    preset: o.Preset = None,
    quality: o.Quality = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Picture and all algorithms side by side.")
    ] = False,
    size: Annotated[int, typer.Option(min=32, max=4096, help="Longer side in pixels.")] = 480,
    load_4bit: o.Load4Bit = False,
    load_8bit: o.Load8Bit = False,
    dtype: o.Dtype = None,
    device: o.Device = None,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
) -> None:
    """Draw which patches became one token (same colour and outline); keeps a quarter by default.

    Example: `pitome-vlm visualize --model demo --image scene.png --tokens 36 --compare`
    """
    del debug
    merging = o.MergeOptions(keep, tokens, ratio, algorithm, preset, quality).given(DEFAULT_KEEP)
    check_picture_name(output)
    from .session import load_images, load_model, merging_line

    (pixels,) = load_images([image])
    loading = o.LoadOptions(model, load_4bit, load_8bit, dtype, device)
    vlm, processor = load_model(loading, merging, verbose=verbose)
    with quiet(verbose):
        drawn = (_compared if compare else _alone)(vlm, processor, pixels, size)
    if verbose:
        say(merging_line(vlm))
    _save(drawn, output)


def _save(drawn: Image.Image, output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    drawn.save(output)
    write(str(output))


def _alone(model: Any, processor: Any, picture: Image.Image, size: int) -> Image.Image:
    from ..measure.visualize import overlay, source_map

    return overlay(picture, source_map(model, processor, picture), size=size)


def _compared(model: Any, processor: Any, picture: Image.Image, size: int) -> Image.Image:
    """The picture and every algorithm at the number of tokens that is in force."""
    from ..measure.visualize import overlay, source_map, strip
    from ..wrapping.wrap import merge_config, schedule_of, wrapped

    tokens, own = schedule_of(model).tokens_out, merge_config(model)
    figures = [("picture", picture)]
    for name in COMPARED:
        # The user's own options belong to the user's own algorithm only.
        config = own if name == own.algorithm else MergeConfig(tokens=tokens, algorithm=name)
        with wrapped(model, config=config):
            groups = source_map(model, processor, picture)
        figures.append((f"{name}, {groups.tokens} tokens", overlay(picture, groups, size=size)))
    return strip(figures, height=size)


def check_picture_name(path: Path) -> None:
    """Refuse a name whose ending says no picture format, before any work is done.

    Raises:
        ValueError: the ending is unknown.
    """
    from PIL import Image

    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"output must be a picture file such as overlay.png, got {path}")
