"""A config on a model: its schedule, its calibration, its visual tokens.

Knows: configs, the registry of algorithms, adapters, and what of them does not fit together. Does
not know: prompts, `forward`, `generate`, or how a model gets wrapped.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..adapters import Adapter
from ..adapters.tower import encoding
from ..merge import algorithms
from ..merge.budget import FINISHER, schedule_for
from ..merge.config import MergeConfig
from ..merge.counts import TokenCount
from ..merge.merge_pass import MergePass
from ..merge.schedule import Schedule
from ..merge.tokens import Encoded
from .image_cache import IMAGE_CACHE, ImageCache
from .positions import Calibration, resolve


@dataclass(frozen=True)
class Merging:
    """What `wrap` put on a model: plain data, safe to copy and to pickle.

    Attributes:
        config: the options.
        adapter: the model family.
    """

    config: MergeConfig
    adapter: Adapter

    def check(self, model: Any) -> None:
        """See that the config fits the model.

        Raises:
            ValueError: the budget cannot be met, or the language model cannot be told what the
                config asks for.
        """
        self.schedule(model)
        self.calibration(model)

    def schedule(self, model: Any, **feature_options: Any) -> Schedule:
        """Token counts for this model; `feature_options` are those of one call.

        Raises:
            ValueError: the budget does not fit the model.
        """
        return schedule_for(self.config, self.adapter.tower_shape(model, **feature_options))

    def calibration(self, model: Any) -> Calibration:
        """What the language model is told about merged tokens.

        Raises:
            ValueError: the config asks for what this language model cannot do.
        """
        wanted = algorithms.get(self.config.algorithm).calibrated
        found = resolve(self.config, self.adapter.text_config(model), wanted=wanted)
        if not self.adapter.own_positions or found.positions != "compact":
            return found
        if self.config.positions == "compact":
            raise ValueError(
                "positions='compact' is not there for this model, which places tokens by the "
                "grid of their picture; use 'mean' or 'original'"
            )
        return dataclasses.replace(found, positions="mean")

    def new_pass(self, model: Any, **feature_options: Any) -> MergePass:
        """A fresh pass for one encoding with these settings."""
        shape = self.adapter.tower_shape(model, **feature_options)
        algorithm = algorithms.get(self.config.algorithm)
        return MergePass(
            config=self.config,
            schedule=schedule_for(self.config, shape),
            algorithm=algorithm,
            grid=shape.grid,
            finisher=algorithms.get(FINISHER) if algorithm.needs_attention else None,
        )

    def vision_inputs(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """What of a call's arguments decides its visual tokens."""
        names = (*self.adapter.vision_inputs, *self.adapter.feature_options)
        return {name: call[name] for name in names if call.get(name) is not None}

    def has_pixels(self, call: Mapping[str, Any]) -> bool:
        """Whether a call brings something to look at."""
        return any(call.get(name) is not None for name in self.adapter.pixel_inputs)

    @property
    def image_input(self) -> str:
        """The argument that holds the pixels of pictures."""
        return next(name for name, kind in self.adapter.pixel_inputs.items() if kind == "image")

    def counts(self, model: Any, call: Mapping[str, Any]) -> dict[str, list[TokenCount]]:
        """Tokens of everything a call brings, by kind; nothing is run.

        Raises:
            ValueError: an input is missing, or the budget does not fit the model.
        """
        inputs = self.vision_inputs(call)
        merge_pass = self.new_pass(model, **self._options(inputs))
        return {
            kind: [merge_pass.count(footprint) for footprint in found]
            for kind, found in self.adapter.footprints(model, inputs).items()
        }

    def is_identity(self, model: Any, call: Mapping[str, Any]) -> bool:
        """Whether a call's images all keep all their tokens, so that nothing has to be done."""
        if not self.has_pixels(call):
            return self.schedule(model, **self._options(call)).is_identity
        found = self.counts(model, call).values()
        return all(count.is_identity for counts in found for count in counts)

    def encode(self, model: Any, call: Mapping[str, Any]) -> list[Encoded]:
        """The visual tokens of a call by kind, merged as configured.

        Args:
            model: an installed model.
            call: of a call's arguments those that decide the tokens, and `image_cache` if any.

        Raises:
            TypeError: `image_cache` is no `ImageCache`.
        """
        inputs, cache = self.vision_inputs(call), call.get(IMAGE_CACHE)

        def run() -> list[Encoded]:
            merge_pass = self.new_pass(model, **self._options(inputs))
            return self.adapter.encode(model, inputs, merge_pass)

        if cache is None:
            return run()
        if not isinstance(cache, ImageCache):
            raise TypeError(
                f"{IMAGE_CACHE} must be a pitome_vlm.ImageCache, got {type(cache).__name__}"
            )
        seen = {n: one for n, one in inputs.items() if n not in self.adapter.place_inputs}
        return cache.find(model, self.config, seen, run)

    @contextlib.contextmanager
    def unmerged(self, model: Any, call: Mapping[str, Any]) -> Iterator[None]:
        """For the model's own code on a call whose images keep all their tokens.

        Leaves out the layers behind the feature layer where the config asks for that.
        """
        with contextlib.ExitStack() as stack:
            if self.config.skip_unused_layers and self.has_pixels(call):
                everything = dataclasses.replace(self, config=MergeConfig(keep=1.0))
                merge_pass = everything.new_pass(model, **self._options(call))
                for tower in self.adapter.parts(model).towers:
                    stack.enter_context(encoding(tower, merge_pass))
            yield

    def _options(self, call: Mapping[str, Any]) -> dict[str, Any]:
        names = self.adapter.feature_options
        return {name: call[name] for name in names if call.get(name) is not None}
