"""Visual tokens kept between questions, so that a second question about an image costs no tower.

A cache belongs to whoever made it and is handed to a call; nothing is remembered anywhere else.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..common import whole_number
from ..merge.config import MergeConfig

Encoded = TypeVar("Encoded")

# The argument of forward, generate and encode_images that holds an `ImageCache`.
IMAGE_CACHE = "image_cache"
# What of a LoRA layer decides which adapters act; switching them changes no weight.
ADAPTER_STATE = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")
PLAIN = (bool, int, float, str, list, tuple, type(None))


class ImageCache:
    """Merged visual tokens of recent images, least recently used ones leave first.

        cache = pitome_vlm.ImageCache()
        model.generate(**inputs, image_cache=cache)      # runs the tower
        model.generate(**other_inputs, image_cache=cache)  # the same pixels: does not

    An entry is found again by content (pixels, their dtype and device, sizes of images), merge
    options, the model, the top level of its config, the version of each of its weights, its active
    LoRA adapters and autocast. A weight written to through `.data`, or one made in inference mode,
    changes without a new version: call `clear` then. The images of one call are one entry: the
    same two images in another order are new. What comes back is shared with the cache and must
    not be changed in place. Where gradients are recorded nothing is read or kept. With keep=1.0 the
    model's untouched code runs and the cache stays unused. Safe to share between threads.

    Args:
        max_bytes: memory that entries may take, on the device they were made on, > 0; one image
            of LLaVA-1.5-7B at 144 tokens in bfloat16 takes 1.2 MB. An entry that is larger on its
            own is not kept.

    Raises:
        ValueError: `max_bytes` is no whole number above 0.
    """

    def __init__(self, max_bytes: int = 256 * 2**20) -> None:
        self.max_bytes = whole_number("max_bytes", max_bytes, 1)
        self._lock = threading.Lock()
        # Numbers are never given twice, so that an entry made while `clear` ran stays right.
        self._models: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
        self._numbers = itertools.count()
        self.clear()

    def clear(self) -> None:
        """Forget everything, the counters included."""
        with self._lock:
            self._entries: OrderedDict[str, tuple[Any, int]] = OrderedDict()
            self._nbytes = self.hits = self.misses = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._nbytes

    def __repr__(self) -> str:
        return (
            f"ImageCache({len(self)} entries, {self.nbytes / 2**20:.1f} of "
            f"{self.max_bytes / 2**20:.1f} MiB, {self.hits} hits, {self.misses} misses)"
        )

    def find(
        self,
        model: nn.Module,
        config: MergeConfig,
        inputs: Mapping[str, Any],
        make: Callable[[], Encoded],
    ) -> Encoded:
        """What `make` gives for these inputs, from the cache where it is there.

        Args:
            model: the LLaVA itself.
            config: the merge options in force.
            inputs: pixels and everything else that decides what `make` returns.
            make: encodes them.
        """
        if torch.is_grad_enabled():
            return make()
        key = self._key(model, config, inputs)
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                self.hits += 1
                found: Encoded = self._entries[key][0]
                return found
            self.misses += 1
        # Outside of the lock: two threads may do the same work once, none waits for a tower.
        made = make()
        size = sum(one.numel() * one.element_size() for one in _tensors(made))
        with self._lock:
            if key not in self._entries and size <= self.max_bytes:
                self._entries[key] = (made, size)
                self._nbytes += size
            while self._nbytes > self.max_bytes:
                _, (_, freed) = self._entries.popitem(last=False)
                self._nbytes -= freed
        return made

    def _key(self, model: nn.Module, config: MergeConfig, inputs: Mapping[str, Any]) -> str:
        with self._lock:
            number = self._models.get(model)
            if number is None:
                number = self._models[model] = next(self._numbers)
        digest = hashlib.sha256(f"{number} {json.dumps(config.to_dict())}".encode())
        # Any in-place change of a weight (an optimizer, load_state_dict) raises its version. All
        # weights, so that none that a family keeps outside tower and projector is forgotten.
        weights = [
            (w.data_ptr(), None if w.is_inference() else w._version) for w in model.parameters()
        ]
        digest.update(repr([weights, *_adapter_states(model), *_surroundings(model)]).encode())
        for name in sorted(inputs):
            digest.update(name.encode())
            _add(digest, inputs[name])
        return digest.hexdigest()


def _adapter_states(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        if hasattr(module, ADAPTER_STATE[0]):
            yield [str(getattr(module, name, None)) for name in ADAPTER_STATE]


def _surroundings(model: nn.Module) -> Iterator[Any]:
    """What decides about features besides weights: the feature layer and the like, autocast."""
    config: Any = model.config
    yield sorted((name, one) for name, one in vars(config).items() if isinstance(one, PLAIN))
    for kind in sorted({weight.device.type for weight in model.parameters()} - {"meta"}):
        if torch.is_autocast_enabled(kind):
            yield kind, torch.get_autocast_dtype(kind)


def _add(digest: Any, value: Any) -> None:
    """Content of tensors and of what holds them; everything else as it prints."""
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype} {value.device} {list(value.shape)}".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    elif isinstance(value, (list, tuple)):
        digest.update(f"{type(value).__name__} of {len(value)}".encode())
        for one in value:
            _add(digest, one)
    else:
        # Numbers and short words; arrays, whose print leaves values out, are no model's input.
        digest.update(f"{value!r};".encode())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)
