"""What all plots share: matplotlib without its global state, colours, and files.

No colour comes twice in one plot. The first colours are those of Okabe and Ito, which the
colour-blind can tell apart; markers tell lines apart without any colour.
"""

from __future__ import annotations

import colorsys
import io
import math
from pathlib import Path
from typing import Any

from ..common import require, write_bytes

# Okabe and Ito without yellow, then Paul Tol's "muted"; black and greys are left for what
# methods are compared with.
_PALETTE = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"),
    *("#882255", "#999933", "#332288", "#aa4499", "#117733", "#661100"),
)
_MARKERS = "os^Dv*PXhp<>d8"
_LINES = ("-", "--", ":", "-.")
_DPI = 150


def figure(width: float, height: float) -> Any:
    """An empty matplotlib figure; sizes in inches."""
    require("matplotlib", "viz", "a plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(made)
    return made


def panels(count: int, columns: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure with `count` axes in rows of at most `columns`; sizes of one panel in inches."""
    wide = min(count, columns)
    rows = math.ceil(count / wide)
    made = figure(width * wide, height * rows)
    axes = list(made.subplots(rows, wide, squeeze=False).ravel())
    for spare in axes[count:]:
        spare.set_axis_off()
    return made, axes[:count]


def rendered(drawn: Any, kind: str = "png") -> bytes:
    """The figure as the content of a file; the same figure always gives the same content."""
    data = io.BytesIO()
    # Matplotlib would write its version, and the time into some formats.
    stamp = {"png": "Software", "svg": "Date", "pdf": "CreationDate"}.get(kind)
    drawn.savefig(data, format=kind, dpi=_DPI, metadata={stamp: None} if stamp else None)
    return data.getvalue()


def save(drawn: Any, path: Path) -> Path:
    """Write a figure atomically; the suffix says which kind of file."""
    return write_bytes(path, rendered(drawn, path.suffix.removeprefix(".").lower()))


def colours(count: int) -> list[str]:
    """`count` different colours as "#rrggbb"; the first ones are the same for every count."""
    found = list(_PALETTE[:count])
    step = 0
    while len(found) < count:
        # Hues by the golden ratio stay apart however many there are.
        hue, light = (0.11 + step * 0.618034) % 1, (0.35, 0.55)[step % 2]
        rgb = colorsys.hls_to_rgb(hue, light, 0.55)
        made = "#" + "".join(f"{round(255 * part):02x}" for part in rgb)
        if made not in found:
            found.append(made)
        step += 1
    return found


def style(index: int, label: str) -> dict[str, Any]:
    """Colour, marker and line of a plot's `index`-th method, for `Axes.plot` and `errorbar`."""
    return {
        "color": colours(index + 1)[index],
        "marker": _MARKERS[index % len(_MARKERS)],
        "ls": _LINES[index // len(_MARKERS) % len(_LINES)],
        "ms": 5,
        "lw": 1.3,
        "label": label,
    }
