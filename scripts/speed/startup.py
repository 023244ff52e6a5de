"""Processor seconds until something can be done: `import pitome_vlm`, `pitome-vlm --help`.

    python -m scripts.speed.startup

The least of some fresh processes each, the interpreter's own start left out of the limits: 0.3 s
and 0.5 s. The exit code is 1 where one is missed. With torch for comparison, which neither imports.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys

from pitome_vlm.common import markdown_table

# What is started, as Python, and the most it may take.
STARTS: dict[str, tuple[str, float | None]] = {
    "the interpreter alone": ("pass", None),
    "import pitome_vlm": ("import pitome_vlm", 0.3),
    "pitome-vlm --help": (
        "import sys; sys.argv = ['pitome-vlm', '--help']\nfrom pitome_vlm.cli import main\nmain()",
        0.5,
    ),
    "import torch": ("import torch", None),
}


def seconds(code: str) -> float:
    """Processor time, user and system, of a fresh interpreter that runs `code`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> int:
    """Measure and print; 1 where a limit is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    taken: dict[str, list[float]] = {name: [] for name in STARTS}
    for _ in range(options.rounds):
        for name, (code, _limit) in STARTS.items():
            taken[name].append(seconds(code))
    own = min(next(iter(taken.values())))
    rows, missed = [], False
    for name, (_code, limit) in STARTS.items():
        least = min(taken[name])
        missed = missed or (limit is not None and least - own > limit)
        rows.append([name, f"{least:.2f}", "" if limit is None else f"{limit:g}"])
    print(markdown_table(["", "processor s", "limit"], rows))
    return int(missed)


if __name__ == "__main__":
    raise SystemExit(main())
