"""Groups of patches as SVG: an overlay in which the group under the pointer lights up."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

import numpy as np
from PIL import Image

from ..tables import png
from .sources import SourceMap

# A caption, what is shown, and the groups of its patches where it has any.
Drawn = tuple[str, Image.Image, SourceMap | None]

# The light must show on any colour: a veil of white, and a line in black and white.
GROUP_STYLE = (
    ".group path{fill:#fff;fill-opacity:0;stroke:none}"
    ".group:hover path{fill-opacity:.55;stroke:#000;stroke-width:.12}"
)


def group_paths(source_map: SourceMap) -> list[tuple[str, str]]:
    """What every group is, and its cells as the data of an SVG path.

    Returns:
        ("5 patches, one token", "M0 2h1v1h-1z...") pairs with the larger groups first, in units of
        a patch; dropped patches are one group, the last.
    """
    groups = source_map.groups.copy()
    if source_map.seen is not None:
        groups[~source_map.seen] = source_map.tokens
    sizes = np.bincount(groups.ravel())
    found = []
    for group in sorted(np.flatnonzero(sizes), key=lambda g: (g == source_map.tokens, -sizes[g])):
        cells = "".join(f"M{x} {y}h1v1h-1z" for y, x in np.argwhere(groups == group))
        what = f"{sizes[group]} patch{'' if sizes[group] == 1 else 'es'}"
        dropped = group == source_map.tokens
        found.append((f"{what} dropped" if dropped else f"{what}, one token", cells))
    return found


def overlay_svg(drawn: Image.Image, source_map: SourceMap, *, style: bool = True) -> str:
    """The drawing of `overlay` with its groups, which light up and say their size, as one element.

    Args:
        drawn: what `overlay` made of the same map.
        source_map: groups of the patches.
        style: with the rules of `GROUP_STYLE`, which a page with many of them says once.
    """
    width, height = drawn.size
    rules = f"<style>{GROUP_STYLE}</style>" if style else ""
    return _svg(width, height, rules + _inside(drawn, source_map), more=' role="img"')


def strip_svg(rows: Sequence[Sequence[Drawn]], *, height: int = 480, gap: int = 16) -> str:
    """Rows of images with captions under them, as one SVG file.

    Args:
        rows: of what is shown, at least one.
        height: of every image in pixels.
        gap: pixels between and around the images.

    Raises:
        ValueError: there is no image.
    """
    if not any(rows):
        raise ValueError("strip_svg needs at least one image, got none")
    font = max(12, round(height / 20))
    placed, top, widest = [], gap, 0
    for row in rows:
        left = gap
        for caption, image, groups in row:
            # An estimate: only the reader's font has a width.
            width = round(image.width * height / image.height)
            if groups is None:
                # A photo of many millions of pixels is shown no larger than the others.
                image = image.resize((width, height), Image.Resampling.LANCZOS)
            space = max(width, round(0.6 * font * len(caption)))
            x = left + (space - width) // 2
            placed.append(
                f'<svg x="{x}" y="{top}" width="{width}" height="{height}" '
                f'viewBox="0 0 {image.width} {image.height}">{_inside(image, groups)}</svg>'
                f'<text x="{left + space / 2:g}" y="{top + height + 1.2 * font:g}" '
                f'font-size="{font}">{html.escape(caption)}</text>'
            )
            left += space + gap
        widest = max(widest, left)
        top += height + 2 * font + gap
    rules = f"<style>{GROUP_STYLE}text{{font-family:sans-serif;text-anchor:middle}}</style>"
    paper = '<rect width="100%" height="100%" fill="#fff"/>'
    return _svg(widest, top, rules + paper + "".join(placed), more=f' width="{widest}"')


def _svg(width: int, height: int, content: str, *, more: str) -> str:
    space = 'xmlns="http://www.w3.org/2000/svg"'
    return f'<svg {space} viewBox="0 0 {width} {height}"{more}>{content}</svg>'


def _inside(image: Image.Image, source_map: SourceMap | None) -> str:
    """An image, and over it the groups of its patches."""
    width, height = image.size
    data = base64.b64encode(png(image)).decode("ascii")
    shown = f'<image href="data:image/png;base64,{data}" width="{width}" height="{height}"/>'
    if source_map is None:
        return shown
    rows, columns = source_map.grid
    groups = "".join(
        f'<g class="group"><title>{title}</title><path d="{cells}"/></g>'
        for title, cells in group_paths(source_map)
    )
    scale = f"{width / columns:.6g} {height / rows:.6g}"
    return f'{shown}<g transform="scale({scale})">{groups}</g>'
