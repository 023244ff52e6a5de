"""What a number was measured on.

Knows: how systems name their processor. Does not know: accelerators, or what is measured.
"""

from __future__ import annotations

import platform
from pathlib import Path


def processor_name() -> str:
    """The processor as the kernel calls it, else as Python does."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
