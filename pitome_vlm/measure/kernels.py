"""How many kernels a piece of work launches, counted without a GPU.

At one image and small layers a GPU waits for launches, not for arithmetic, so this number and not
the FLOPs is what such a call costs there. Shapes of a model decide it, widths do not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typing_extensions import override

# They give memory and write nothing to it, or are views by another name.
_NOTHING = {"aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided"}
_NOTHING |= {"aten::new_empty_strided", "aten::_unsafe_view"}


class KernelCount(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operators that compute tensors in its `with` block: no views, no bare allocations.

    An operator that a library splits into several kernels counts once, as a sort does on CUDA.

    Attributes:
        by_name: how often each operator ran, by name as in "aten::bmm".
        bytes: read and written by all of them, if every tensor is read once.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.by_name: Counter[str] = Counter()
        self.bytes = 0

    @property
    def total(self) -> int:
        """All that were counted."""
        return self.by_name.total()

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        found = func(*args, **(kwargs or {}))
        name: str = func._schema.name
        if not func.is_view and name not in _NOTHING:
            outputs = [one for one in tree_leaves(found) if isinstance(one, Tensor)]
            if outputs:
                self.by_name[name] += 1
                inputs = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
                self.bytes += sum(one.numel() * one.element_size() for one in inputs + outputs)
        return found


@torch.no_grad()
def count_kernels(work: Callable[[], Any]) -> KernelCount:
    """The kernels of one run of `work`, which is run once before, so that nothing is set up."""
    work()
    found = KernelCount()
    with found:
        work()
    return found
