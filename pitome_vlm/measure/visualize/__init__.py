"""Show which patches of a picture became one visual token.

    figure = overlay(image, source_map(model, processor, image))

Knows: source maps, how to draw them and how to lay figures and tables out on one page. Does not
know: how a model chose its groups, the command line, or the demo. Needs Pillow and numpy only.
"""

from ..tables import Cell, Figure, Table, html_report
from .drawing import overlay, strip
from .sources import SourceMap, seen_region, source_map

__all__ = [
    "Cell",
    "Figure",
    "SourceMap",
    "Table",
    "html_report",
    "overlay",
    "seen_region",
    "source_map",
    "strip",
]
