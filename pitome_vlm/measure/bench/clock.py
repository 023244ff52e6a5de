"""Where the time of one answer goes, from inside one ordinary call of `generate`.

Tower, projector, layers and head of the language model carry hooks while `watched` is open; on a
wrapped model merges are timed as well. Nothing waits for the device in between. Times come from
device events on an accelerator, from the host's clock on a CPU.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ...adapters import find_adapter
from ...wrapping.wrap import base_model, is_wrapped, observed

Mark = Any


class Clock:
    """Marks in time and the milliseconds between them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.spans: dict[str, list[tuple[Mark, Mark]]] = {}
        self._open: dict[str, list[Mark]] = {}

    def mark(self) -> Mark:
        """Now, on the device's own time line where it has one."""
        if self.device.type == "cpu":
            return time.perf_counter()
        module = torch.get_device_module(self.device)
        event = module.Event(enable_timing=True)
        # Without a stream it would be that of the current device, which may be another one.
        streams = getattr(module, "current_stream", None)
        event.record(*([] if streams is None else [streams(self.device)]))
        return event

    def start(self, name: str) -> None:
        """Open a span; spans of one name may be nested."""
        self._open.setdefault(name, []).append(self.mark())

    def stop(self, name: str) -> None:
        """Close the span of that name that was opened last."""
        self.spans.setdefault(name, []).append((self._open[name].pop(), self.mark()))

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Open a span for the `with` block."""
        self.start(name)
        try:
            yield
        finally:
            self.stop(name)

    def synchronize(self) -> None:
        """Wait until the device has finished everything that was queued."""
        module = torch.get_device_module(self.device)
        if self.device.type == "mps":
            module.synchronize()
        elif self.device.type != "cpu":
            module.synchronize(self.device)

    def between(self, start: Mark, end: Mark) -> float:
        """Milliseconds from one mark to another; the device must have passed both."""
        if self.device.type == "cpu":
            return float(end - start) * 1e3
        return float(start.elapsed_time(end))

    def total(self, name: str) -> float:
        """Milliseconds of all spans of a name, 0 where there are none."""
        return sum(self.between(*span) for span in self.spans.get(name, []))


@contextlib.contextmanager
def watched(model: Any, clock: Clock) -> Iterator[None]:
    """Record spans of a model's parts in the `with` block: tower, projector, layers, head."""
    base: Any = base_model(model)
    parts = find_adapter(base).parts(base)
    layers = decoder_layers(parts.language_model)
    handles: list[Any] = []

    def around(name: str, first: nn.Module, last: nn.Module) -> None:
        handles.append(first.register_forward_pre_hook(lambda *_: clock.start(name)))
        handles.append(last.register_forward_hook(lambda *_: clock.stop(name)))

    try:
        for tower in parts.towers:
            around("tower", tower, tower)
        around("projector", parts.projector, parts.projector)
        around("layers", layers[0], layers[-1])
        head = base.get_output_embeddings()
        around("head", head, head)
        with observed(base, clock.span) if is_wrapped(base) else contextlib.nullcontext():
            yield
    finally:
        for handle in handles:
            handle.remove()


def decoder_layers(language_model: tuple[nn.Module, ...]) -> nn.ModuleList:
    """The layers of a language model: the longest list of modules in it."""
    lists = [
        module
        for part in language_model
        for module in part.modules()
        if isinstance(module, nn.ModuleList) and len(module)
    ]
    if not lists:
        raise TypeError("bench found no layers in the language model, so there is nothing to time")
    return max(lists, key=len)


def phases_of(clock: Clock, start: Mark, end: Mark) -> dict[str, float]:
    """Milliseconds of the phases of one answer, between marks before and after `generate`."""
    spans, between = clock.spans, clock.between
    inside, projector = clock.total("merge in tower"), clock.total("projector")
    tower = clock.total("tower") - inside
    merge = inside
    if "encode" in spans:
        merge += max(0.0, clock.total("encode") - clock.total("tower") - projector)
    steps, heads = spans["layers"], spans["head"]
    before, first = between(start, steps[0][0]), between(start, heads[0][1])
    further = len(heads) - 1
    return {
        "tower": tower,
        "merge": merge,
        "projector": projector,
        "prompt": before - tower - merge - projector,
        "prefill": first - before,
        "first": first,
        "decode": between(heads[0][1], heads[-1][1]) / further,
        "answer": between(start, end),
        "prefill_layers": between(*steps[0]),
        "decode_layers": sum(between(*step) for step in steps[1:]) / further,
    }
