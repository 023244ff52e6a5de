"""The command that is running, for the reports that it writes."""

import shlex
import sys


def command_line() -> str:
    """What was typed: `python -m scripts.speed.tower --threads 1`."""
    module = sys.modules["__main__"].__spec__.name.removesuffix(".__main__")
    return shlex.join(["python", "-m", module, *sys.argv[1:]])
