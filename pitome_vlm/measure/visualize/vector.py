"""Groups of patches as SVG: an overlay in which the group under the pointer lights up."""

from __future__ import annotations

import base64

import numpy as np
from PIL import Image

from ..tables import png
from .sources import SourceMap

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
    rows, columns = source_map.grid
    width, height = drawn.size
    data = base64.b64encode(png(drawn)).decode("ascii")
    groups = "".join(
        f'<g class="group"><title>{title}</title><path d="{cells}"/></g>'
        for title, cells in group_paths(source_map)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">'
        f"{f'<style>{GROUP_STYLE}</style>' if style else ''}"
        f'<image href="data:image/png;base64,{data}" width="{width}" height="{height}"/>'
        f'<g transform="scale({width / columns:.6g} {height / rows:.6g})">{groups}</g></svg>'
    )
