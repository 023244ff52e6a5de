"""The arguments of a call by name, whichever way the caller passed them."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from ..releases import with_cache_name


@functools.cache
def _signature(function: Any) -> inspect.Signature:
    return inspect.signature(function)


def parameters_of(method: Any) -> dict[str, inspect.Parameter]:
    """Parameters of a bound method, without self."""
    found = dict(_signature(method.__func__).parameters)
    del found[next(iter(found))]
    return found


def by_name(method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a bound method by name; those that are missing stay missing.

    Raises:
        TypeError: an argument is given twice, or there are too many.
    """
    if not args:
        return dict(kwargs)
    by_place = dict(zip(parameters_of(method), args, strict=False))
    if by_place.keys() & kwargs.keys() or len(args) > len(by_place):
        # Let Python say what is wrong.
        _signature(method.__func__).bind(method.__self__, *args, **kwargs)
    return by_place | kwargs


def named_arguments(method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """As `by_name`, with the cache under the name that this release of transformers has for it."""
    return with_cache_name(by_name(method, args, kwargs))
