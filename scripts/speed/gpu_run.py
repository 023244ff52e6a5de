"""One run of the GPU benchmark: what is asked for, what there is so far, how much time is left.

Steps and the report; what is measured is in `gpu_bench.py` and `gpu_attention.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from pitome_vlm.adapters import find_adapter
from pitome_vlm.common import write_text
from pitome_vlm.measure.bench import Case, build, inputs_for

from .attention_ways import first_line


@dataclass
class Run:
    """What is asked for, what there is so far, and how much time is left.

    Attributes:
        options: of the command line.
        sections: of the report, Markdown.
        failed: titles of steps that an error ended.
    """

    options: argparse.Namespace
    started: float = field(default_factory=time.monotonic)
    sections: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    @property
    def left(self) -> float:
        """Seconds."""
        return float(self.options.seconds) - (time.monotonic() - self.started)

    def add(self, *lines: str) -> None:
        """Lines of the report, written at once."""
        self.sections += lines
        write_text(self.options.out / "report.md", "\n".join(self.sections) + "\n")

    def save(self, name: str, values: Any) -> None:
        """One JSON file."""
        write_text(self.options.out / f"{name}.json", json.dumps(values, indent=1) + "\n")

    def build(self, shape: str, **changes: Any) -> Any:
        """A model on the device."""
        options = {
            "layers": self.options.layers,
            "dtype": getattr(torch, self.options.dtype),
            "device": self.options.device,
        }
        return build(shape, **(options | changes))

    @contextlib.contextmanager
    def step(self, title: str, needs: float) -> Iterator[None]:
        """A step that is left out where time is short; an error ends it and not the others."""
        if self.left < needs:
            self.add("", f"## {title}", "", f"Left out: {self.left:.0f} s were left.")
            raise OutOfTimeError
        print(f"{title} ({self.left:.0f} s left)", flush=True)
        try:
            yield
        except (torch.OutOfMemoryError, MemoryError) as error:
            self.add("", f"## {title}", "", f"Ran out of memory: {first_line(error)}")
        except OutOfTimeError:
            raise
        except Exception as error:
            # A machine with a GPU is had for minutes: what does not work there is a result as well.
            self.failed.append(title)
            lines = traceback.format_exc().rstrip().splitlines()[-40:]
            self.add("", f"## {title}", "", f"Failed: {type(error).__name__}", "", "```")
            self.add(*lines, "```")
        finally:
            gc.collect()
            if self.options.device != "cpu":
                # After an error of the device even this fails.
                with contextlib.suppress(RuntimeError):
                    torch.cuda.empty_cache()


class OutOfTimeError(Exception):
    """The rest of the steps is left out."""


def vision_inputs(model: Any, batch: int) -> dict[str, torch.Tensor]:
    """Pixels of random images, and what belongs to them."""
    inputs = inputs_for(model, Case(batch))
    return {name: inputs[name] for name in find_adapter(model).vision_inputs if name in inputs}
