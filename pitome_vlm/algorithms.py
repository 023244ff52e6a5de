"""The public registry of merge algorithms, and what an algorithm of your own is made of.

`register` adds one in this process; a package adds its own through an entry point in the group
`pitome_vlm.algorithms` (CONTRIBUTING.md has the steps).
"""

from __future__ import annotations

from .merge.algorithm import Algorithm, MergeContext
from .merge.algorithms import available, get, register
from .merge.plan import MergePlan

__all__ = ["Algorithm", "MergeContext", "MergePlan", "available", "get", "register"]
