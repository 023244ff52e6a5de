"""Which releases of transformers this package runs on, said before an import fails over a name.

Knows: version numbers. Does not know: transformers itself, which is not imported here.
"""

from __future__ import annotations

import importlib.metadata
import re

OLDEST_TRANSFORMERS = (4, 57)


def check_transformers(found: str | None = None) -> None:
    """See that transformers is recent enough.

    Args:
        found: its version; None takes the installed one.

    Raises:
        ImportError: it is not; the message says what is missing there.
    """
    if found is None:
        found = importlib.metadata.version("transformers")
    parts = re.match(r"(\d+)\.(\d+)", found)
    if parts and tuple(map(int, parts.groups())) < OLDEST_TRANSFORMERS:
        oldest = ".".join(map(str, OLDEST_TRANSFORMERS))
        raise ImportError(
            f"pitome_vlm needs transformers {oldest} or later, found {found}: older releases lack "
            "transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS and transformers.masking_utils, "
            "or differ from them. The original llava package runs on later releases too "
            "(docs/original-llava.md)"
        )
