"""What a session found, as HTML; everything that a person or a model wrote is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup, escape

from ..measure.tables import template
from ..measure.visualize import Part, overlay, overlay_svg
from .session import Refusal, Reply

# Longer side of a drawing in pixels, where its patches are not too many for that.
_SIZE, _SMALL = 480, 240
_LEAST_CELL = 4


def compared_html(replies: Sequence[Reply]) -> str:
    """Both answers of `Session.compare` next to each other, and what was merged."""
    before, after = replies
    return _rendered(
        "compared.html.jinja",
        replies=replies,
        faster=before.first_token_ms / max(after.first_token_ms, 1e-3),
        drawings=_drawings(after.parts, _SIZE),
    )


def methods_html(found: Sequence[Reply | Refusal], unmerged: Reply) -> str:
    """A strip of what every algorithm merges and answers; other answers than unmerged stand out."""
    rows = [
        (one.name, one, [])
        if isinstance(one, Refusal)
        else (one.config.algorithm, one, _drawings(one.parts, _SMALL))
        for one in found
    ]
    return _rendered("methods.html.jinja", rows=rows, right=unmerged.answer.text)


def problem_html(message: str) -> str:
    """An error as one line."""
    return f'<p class="pv pv-problem" role="alert">{escape(" ".join(message.split()))}</p>'


def _rendered(name: str, **values: Any) -> str:
    text: str = template(name, __package__).render(time=_time, **values)
    return text


def _drawings(parts: Sequence[Part], size: int) -> list[tuple[str, Markup]]:
    found = []
    for part in parts:
        fits = max(size, _LEAST_CELL * max(part.groups.grid))
        drawn = overlay(part.image, part.groups, size=fits)
        title = ", ".join(filter(None, (part.title, f"{part.groups.tokens} tokens")))
        found.append((title, Markup(overlay_svg(drawn, part.groups, style=False))))
    return found


def _time(milliseconds: float) -> str:
    if milliseconds >= 1000:
        return f"{milliseconds / 1000:.1f} s"
    return f"{milliseconds:.1f} ms" if milliseconds < 100 else f"{milliseconds:.0f} ms"
