"""The merge algorithms, by name.

Every module in this folder is an algorithm: it is named like it and holds it as `ALGORITHM`.
Algorithms of other packages are found by their entry point in the group `pitome_vlm.algorithms`.
"""

from __future__ import annotations

from typing import cast

from .. import registry
from ..algorithm import Algorithm

__all__ = ["available", "get", "register"]


def register(algorithm: Algorithm) -> Algorithm:
    """Make an algorithm available by name, in this process.

    Raises:
        TypeError: not an `Algorithm`.
        ValueError: the name is taken by another algorithm.
    """
    if not isinstance(algorithm, Algorithm):
        raise TypeError(f"register an Algorithm(...), got {algorithm!r}")
    registry.register(algorithm)
    return algorithm


def get(name: str) -> Algorithm:
    """The algorithm of that name.

    Raises:
        ValueError: there is none (the message suggests the closest name, lists all and says how
            to add one), or the package that provides it cannot be imported.
    """
    return cast(Algorithm, registry.find(name))


def available() -> list[str]:
    """Names of the algorithms that can be used, sorted.

    One of another package that cannot be imported is left out with a warning.
    """
    return registry.available()
