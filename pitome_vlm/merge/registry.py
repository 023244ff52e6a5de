"""Algorithms by name: those of this package, of other packages, and registered ones.

Holds objects and looks them up. It imports no torch by itself; the module of an algorithm, which
does, is imported when that algorithm is first asked for.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import pkgutil
import sys
import warnings
from pathlib import Path
from typing import Any

from ..common import suggest

GROUP = "pitome_vlm.algorithms"
_BUILT_IN = "algorithms"  # a folder next to this file, one module per algorithm, named like it
_known: dict[str, Any] = {}


def register(algorithm: Any) -> None:
    """Make an algorithm available by name.

    One whose plan function has the same module and name replaces the earlier one, so that the cell
    of a notebook can run again.

    Raises:
        ValueError: the name is taken by another algorithm of this process. One that only an
            entry point names gives way.
    """
    name = algorithm.name
    if name in _known or name in _built_in():
        earlier = find(name)
        if earlier is not algorithm and _origin(earlier) != _origin(algorithm):
            raise ValueError(
                f"algorithm {name!r} is already registered, with the plan function "
                f"{'.'.join(_origin(earlier))}; give this one another name"
            )
    _known[name] = algorithm


def _origin(algorithm: Any) -> tuple[str, str]:
    plan = algorithm.plan
    return plan.__module__, getattr(plan, "__qualname__", repr(plan))


def find(name: str) -> Any:
    """The algorithm of that name.

    Raises:
        ValueError: there is none (the message suggests the closest name, lists all and says how
            to add one), or the package that provides it cannot be imported.
    """
    check(name)
    if name in _known:
        return _known[name]
    if name in _built_in():
        found = importlib.import_module(f".{_BUILT_IN}.{name}", __package__).ALGORITHM
    else:
        found = _loaded(_entry_points()[name])
    # Importing its module may have registered it.
    return _known.setdefault(name, found)


def names() -> list[str]:
    """All names, sorted; nothing is imported to find out."""
    return sorted({*_known, *_built_in(), *_entry_points()})


def available() -> list[str]:
    """Names of the algorithms that can be used, sorted.

    Algorithms of other packages are imported; one that fails is left out with a warning.
    """
    usable = []
    for name in names():
        try:
            if name in _known or name not in _built_in():
                find(name)
        except ValueError as error:
            warnings.warn(str(error), stacklevel=2)
        else:
            usable.append(name)
    return usable


def check(name: str) -> None:
    """Refuse a name that no algorithm has; nothing is imported.

    Raises:
        ValueError: see `find`.
    """
    if name in _known or name in _built_in() or name in _entry_points():
        return
    raise ValueError(
        f"unknown algorithm {name!r}.{suggest(name, names())} Available: {', '.join(names())}. "
        "An algorithm of another package is found once that package is installed (its entry "
        f"point is in the group {GROUP!r}), or after pitome_vlm.algorithms.register(...)"
    )


@functools.cache
def _built_in() -> frozenset[str]:
    folder = Path(__file__).with_name(_BUILT_IN)
    return frozenset(module.name for module in pkgutil.iter_modules([str(folder)]))


def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    return _entry_points_on(tuple(sys.path))


@functools.lru_cache(maxsize=1)
def _entry_points_on(path: tuple[str, ...]) -> dict[str, importlib.metadata.EntryPoint]:
    """The entry points of the installed packages; `path` is where they were looked for."""
    del path
    found: dict[str, importlib.metadata.EntryPoint] = {}
    for point in importlib.metadata.entry_points(group=GROUP):
        if point.name in _built_in() or found.get(point.name, point).value != point.value:
            warnings.warn(
                f"algorithm {point.name!r} of entry point {point.value!r} is ignored: the name is "
                "taken",
                stacklevel=2,
            )
        else:
            found[point.name] = point
    return found


def _loaded(point: importlib.metadata.EntryPoint) -> Any:
    package = f" of {point.dist.name} {point.dist.version}" if point.dist else ""
    origin = f"algorithm {point.name!r}{package} (entry point {point.value!r})"
    try:
        found = point.load()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{origin} cannot be imported: {reason}") from error
    algorithm = getattr(found, "ALGORITHM", found)
    name = getattr(algorithm, "name", None)
    if name != point.name or not hasattr(algorithm, "plan"):
        what = f"an algorithm named {name!r}" if name else f"{type(algorithm).__name__}"
        raise ValueError(
            f"{origin} is {what}; it must be an Algorithm named {point.name!r}, or a module that "
            "holds one as ALGORITHM"
        )
    return algorithm
