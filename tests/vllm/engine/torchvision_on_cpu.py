"""Lets the published torchvision be imported with a CPU torch. TEST ENVIRONMENT ONLY.

The wheel on PyPI is built for CUDA: its compiled part does not load, and torchvision then fails at
import because the operators of that part are missing. vLLM's LLaVA imports the pure Python part
(through a processor of transformers), so declaring those operators is enough. `install` writes a
`.pth` file, because vLLM starts processes of its own that need it as well.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import shutil
import site
import sys
from pathlib import Path
from typing import Any

OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_kept: list[Any] = []


class _DeclaringLoader(importlib.abc.Loader):
    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        import torch

        if not _kept and not hasattr(torch.ops.torchvision, "nms"):
            library = torch.library.Library("torchvision", "DEF")
            for operator in OPERATORS:
                library.define(operator)
            _kept.append(library)
        self._loader.exec_module(module)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != "torchvision":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _DeclaringLoader(spec.loader)
        return spec


def install() -> None:
    """Make every Python process of this environment use the stand-in."""
    folder = Path(site.getsitepackages()[0])
    shutil.copy(__file__, folder / "torchvision_on_cpu.py")
    (folder / "torchvision_on_cpu.pth").write_text("import torchvision_on_cpu\n")


if __name__ == "__main__":
    install()
else:
    sys.meta_path.insert(0, _Finder())
