"""`pitome-vlm visualize`: which patches of an image became one token."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ..common import check_choice, write_bytes
from ..merge.config import MergeConfig
from . import options as o
from .session import check_output
from .terminal import quiet, write

if TYPE_CHECKING:
    from PIL import Image

    from ..measure.visualize import Drawn

FORMATS = ("png", "svg", "pdf")
COMPARED = ("pitome_plus", "pitome", "tome", "random", "pool")


Output = Annotated[
    Path,
    o.output_option(
        "Folder to write to; every image becomes NAME-merged.png there, or NAME-compared.png, with "
        "the ending of --format."
    ),
]
Compare = Annotated[
    bool,
    o.plain("Compare the usual five algorithms; `--algorithms` names others.", None, "--compare"),
]
Format = Annotated[
    str,
    o.plain("png, pdf, or svg, in which the patches of a token light up together.", "NAME"),
]
Size = Annotated[int, o.plain("Longer side of the drawn image in pixels.", "N", min=32, max=4096)]


def visualize(
    model: o.Model,
    image: o.Images,
    output: Output = Path("pitome-visualize"),
    merging: o.Merging = o.Merging(),
    algorithms: o.Algorithms = None,
    compare: Compare = False,
    size: Size = 480,
    format: Format = "png",
    overwrite: o.Overwrite = False,
    loading: o.Loading = o.Loading(),
    verbose: o.Verbose = False,
) -> None:
    """Draw which patches of an image became one token: same colour and outline, same token.

    Without a budget, a quarter of the visual tokens is kept, or what the checkpoint's own
    pitome_config.json says.

    Example: `pitome-vlm visualize --model demo --image scene.png --tokens 36 --compare`
    """
    given = merging.given()
    names = o.words("algorithms", algorithms) if algorithms else list(COMPARED) if compare else []
    own = given.get("algorithm")
    if names and own is not None and own not in names:
        names.insert(0, own)
    check_choice("format", format, FORMATS)
    kind = f"{'compared' if names else 'merged'}.{format}"
    targets = _targets(output, image, kind, overwrite)
    from .session import check_algorithm, load_images, load_merging

    images = load_images(image)
    with quiet(verbose):
        for name in names:
            check_algorithm({"algorithm": name})
    vlm, processor = load_merging(model, given, verbose=verbose, encoders=True, **vars(loading))
    for target, pixels in zip(targets, images, strict=True):
        with quiet(verbose):
            rows = (
                _compared(vlm, processor, pixels, names, size)
                if names
                else [_figures(vlm, processor, pixels, size)]
            )
        write_bytes(target, _file(rows, format, size))
        write(str(target))


def _targets(folder: Path, images: list[str], kind: str, overwrite: bool) -> list[Path]:
    """The file of every image; refused before anything is loaded if they cannot be written."""
    targets = [folder / f"{Path(name).stem}-{kind}" for name in images]
    for target in targets:
        if targets.count(target) > 1:
            raise ValueError(f"two images would both be written to {target}; draw them separately")
    check_output(folder, [target.name for target in targets], overwrite=overwrite)
    return targets


def _file(rows: list[list[Drawn]], format: str, size: int) -> bytes:
    """The content of a file: one row of images, or several one below the other."""
    from ..measure.tables import png
    from ..measure.visualize import stack, strip, strip_svg

    if format == "svg":
        return strip_svg(rows, height=size).encode("utf-8")
    strips = [strip([(text, shown) for text, shown, _ in row], height=size) for row in rows]
    sheet = strips[0] if len(strips) == 1 else stack(strips)
    if format == "png":
        return png(sheet)
    content = io.BytesIO()
    # Pillow stores JPEG in it: at this quality, and all colours as fine as the brightness, no line
    # of an outline blurs.
    sheet.save(content, "PDF", resolution=144, quality=95, subsampling=0)
    return content.getvalue()


def _figures(model: Any, processor: Any, image: Image.Image, size: int) -> list[Drawn]:
    """Every grid of the image, with what it is and its number of tokens."""
    from ..measure.visualize import overlay, source_maps

    return [
        (
            f"{part.title}{', ' * bool(part.title)}{part.groups.tokens} tokens",
            overlay(part.image, part.groups, size=size),
            part.groups,
        )
        for part in source_maps(model, processor, image)
    ]


def _compared(
    model: Any, processor: Any, image: Image.Image, names: list[str], size: int
) -> list[list[Drawn]]:
    """The image, and every algorithm at the number of tokens in force.

    A row for all of them; one for each where an image has several grids.
    """
    from ..wrapping.wrap import merge_config, schedule_of, wrapped

    tokens, own = schedule_of(model).tokens_out, merge_config(model)
    rows: list[list[Drawn]] = []
    for name in names:
        # The user's own options belong to the user's own algorithm only.
        config = own if name == own.algorithm else MergeConfig(tokens=tokens, algorithm=name)
        with wrapped(model, config=config):
            found = _figures(model, processor, image, size)
        rows.append([(f"{name}, {text}", shown, groups) for text, shown, groups in found])
    rows.insert(0, [("image", image, None)])
    # The image has one row to itself only where the others have several grids.
    alone = all(len(row) == 1 for row in rows)
    return [[row[0] for row in rows]] if alone else rows
