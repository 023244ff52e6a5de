"""Options that belong to one algorithm, next to those that all algorithms share.

An algorithm names a frozen dataclass whose fields are its own options (`Algorithm.options`). Here
plain names and values become an object of that class, or an error that says who has the option.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from ..common import suggest
from . import registry

Own = TypeVar("Own")


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """The options of an algorithm that has none."""


def defaults(algorithm: str) -> dict[str, Any]:
    """The options of an algorithm with their default values."""
    return values_of(registry.find(algorithm).options())


def values_of(options: Any) -> dict[str, Any]:
    """The fields of an options object by name."""
    return {item.name: getattr(options, item.name) for item in dataclasses.fields(options)}


def as_kind(options: object, kind: type[Own]) -> Own:
    """Options as an object of their algorithm's class; those of another one count as none."""
    if isinstance(options, kind):
        return options
    found = type(options)
    # A cell of a notebook that runs again defines the class anew.
    again = (found.__module__, found.__qualname__) == (kind.__module__, kind.__qualname__)
    return kind(**values_of(options)) if again else kind()


def owners(option: str) -> dict[str, Any]:
    """The algorithms that have an option of their own of that name, with its default value."""
    found = {}
    for name in registry.available():
        own = defaults(name)
        if option in own:
            found[name] = own[option]
    return found


def parse(
    algorithm: str, shared: Sequence[str], base: object, given: Mapping[str, Any]
) -> object | None:
    """An algorithm's own options from plain values.

    A value that is only the default of another algorithm's option is dropped: saved configs of
    older versions list the options of every algorithm.

    Args:
        algorithm: its name.
        shared: names of the shared options, for suggestions.
        base: an options object to start from, a mapping of names to values, or None.
        given: names and values; they win over `base`.

    Returns:
        An object of `Algorithm.options`, None where all are at their defaults.

    Raises:
        ValueError: there is no such algorithm, no such option, or a value is out of range.
        TypeError: a value of the wrong type.
    """
    registry.check(algorithm)
    if base is None and not given:
        return None
    kind = registry.find(algorithm).options
    if base is not None and not isinstance(base, (kind, Mapping)):
        raise TypeError(
            f"options of algorithm {algorithm!r} must be {kind.__name__}(...) or a mapping of "
            f"names to values, got {base!r}"
        )
    start = kind() if base is None or isinstance(base, Mapping) else base
    values = {**base, **given} if isinstance(base, Mapping) else dict(given)
    own = values_of(start)
    for name in [name for name in values if name not in own]:
        _check_foreign(name, values.pop(name), algorithm, [*shared, *own])
    found: object = dataclasses.replace(start, **values)
    return None if found == kind() else found


def _check_foreign(name: str, value: Any, algorithm: str, known: list[str]) -> None:
    """Refuse an option that an algorithm does not have, unless it only says a default."""
    others = owners(name)
    if any(_same(value, default) for default in others.values()):
        return
    if others:
        raise ValueError(
            f"algorithm {algorithm!r} has no option {name!r}, got {name}={value!r}; it belongs to "
            f"{', '.join(others)}"
        )
    raise ValueError(
        f"unknown merge option {name!r}.{suggest(name, known)} Known options of {algorithm!r}: "
        f"{', '.join(known)}"
    )


def _same(value: Any, default: Any) -> bool:
    # True == 1 in Python, but nobody writes one for the other.
    return bool(value == default) and isinstance(value, bool) == isinstance(default, bool)


def without_foreign(
    values: Mapping[str, Any], algorithm: str, shared: Iterable[str]
) -> dict[str, Any]:
    """The values of a file, without options that only other algorithms have.

    Earlier versions wrote the options of all algorithms into every file.

    Args:
        values: by name.
        algorithm: that of the file.
        shared: names of the options that belong to no algorithm.

    Raises:
        ValueError: there is no such algorithm.
    """
    stay = {*shared, *defaults(algorithm)}
    return {name: one for name, one in values.items() if name in stay or not owners(name)}
