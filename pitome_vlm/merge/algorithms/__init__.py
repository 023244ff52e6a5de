"""The registry of merge algorithms.

Knows: names. Each algorithm is one file that only decides and one line here. Does not know:
models, or how a plan is applied (`algorithm.py`).
"""

from __future__ import annotations

from ...common import suggest
from ..algorithm import Algorithm
from . import (
    diffrate,
    divprune,
    none,
    pitome,
    pitome_plus,
    pool,
    random_drop,
    tofu,
    tome,
    visionzip,
)

_REGISTRY: dict[str, Algorithm] = {}


def register(algorithm: Algorithm) -> Algorithm:
    """Make an algorithm available by name.

    Raises:
        ValueError: the name is taken by another algorithm.
    """
    if _REGISTRY.get(algorithm.name, algorithm) is not algorithm:
        raise ValueError(f"algorithm {algorithm.name!r} is already registered")
    _REGISTRY[algorithm.name] = algorithm
    return algorithm


def get(name: str) -> Algorithm:
    """The algorithm of that name.

    Raises:
        ValueError: there is none; the message suggests the closest name and lists all.
    """
    if name not in _REGISTRY:
        raise ValueError(
            f"unknown algorithm {name!r}.{suggest(name, available())} "
            f"Available: {', '.join(available())}"
        )
    return _REGISTRY[name]


def available() -> list[str]:
    """Registered names, sorted."""
    return sorted(_REGISTRY)


for _module in (
    pitome,
    pitome_plus,
    tome,
    tofu,
    diffrate,
    visionzip,
    divprune,
    random_drop,
    pool,
    none,
):
    register(_module.ALGORITHM)
