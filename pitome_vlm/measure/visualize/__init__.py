"""Show which patches of an image became one visual token.

    figure = overlay(image, source_map(model, processor, image))

Needs Pillow and numpy only.
"""

from ..tables import Cell, Figure, Table, html_report
from .drawing import overlay, stack, strip
from .parts import Part, source_maps
from .sources import SourceMap, seen_region, source_map
from .vector import GROUP_STYLE, Drawn, overlay_svg, strip_svg

__all__ = [
    "GROUP_STYLE",
    "Cell",
    "Drawn",
    "Figure",
    "Part",
    "SourceMap",
    "Table",
    "html_report",
    "overlay",
    "overlay_svg",
    "seen_region",
    "source_map",
    "source_maps",
    "stack",
    "strip",
    "strip_svg",
]
