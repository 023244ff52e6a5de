"""Show which patches of an image became one visual token.

    figure = overlay(image, source_map(model, processor, image))

Needs Pillow and numpy only.
"""

from ..tables import Cell, Figure, Table, html_report
from .drawing import overlay, stack, strip
from .parts import Part, source_maps
from .sources import SourceMap, seen_region, source_map

__all__ = [
    "Cell",
    "Figure",
    "Part",
    "SourceMap",
    "Table",
    "html_report",
    "overlay",
    "seen_region",
    "source_map",
    "source_maps",
    "stack",
    "strip",
]
