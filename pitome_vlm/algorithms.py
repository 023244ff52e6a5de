"""The public registry of merge algorithms: `available`, `get`, `register`."""

from __future__ import annotations

from .merge.algorithms import available, get, register

__all__ = ["available", "get", "register"]
