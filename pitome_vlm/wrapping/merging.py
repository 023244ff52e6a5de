"""What `wrap` puts on a model, and the plan of one call that follows from it.

A `Merging` is settings; a `CallPlan` is everything that one call needs to know (counts, places,
what is encoded), worked out once and handed down. How a prompt is shortened, how `forward` and
`generate` run and how a model gets wrapped is left to the modules that use them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..adapters import Adapter
from ..adapters.tower import encoding
from ..adapters.tower_tokens import patch_grid
from ..merge import algorithms
from ..merge.algorithm import Algorithm
from ..merge.budget import new_pass, schedule_for
from ..merge.config import MergeConfig
from ..merge.counts import TokenCount
from ..merge.merge_pass import MergePass, Watch
from ..merge.pixels import keep_of
from ..merge.schedule import Schedule, TowerShape
from ..merge.tokens import Encoded, VisualTokens
from .image_cache import IMAGE_CACHE, ImageCache
from .masks import Masks
from .positions import Calibration, resolve

# The attribute of a wrapped model that holds its `Merging`.
STATE = "_pitome"


@dataclass(frozen=True)
class Merging:
    """What `wrap` puts on a model: plain data, safe to copy and to pickle.

    Attributes:
        config: the options.
        adapter: the model family.
        watch: measures the parts of an encoding ("encode", "merge in tower"), None to measure
            nothing.
        carrier: what the language model was prepared for, see `Calibration`; None where these are
            not the settings of a wrapped model.
    """

    config: MergeConfig
    adapter: Adapter
    watch: Watch | None = None
    carrier: str | None = None

    def has_pixels(self, call: Mapping[str, Any]) -> bool:
        """Whether a call brings something to look at."""
        found = False
        for name in self.adapter.pixel_inputs:
            found = found or call.get(name) is not None
        return found

    @property
    def image_input(self) -> str:
        """The argument that holds the pixels of images."""
        return next(name for name, kind in self.adapter.pixel_inputs.items() if kind == "image")

    def plan(self, model: Any, call: Mapping[str, Any] | None = None) -> CallPlan:
        """Work out what a call needs to know.

        Args:
            model: the model itself (no PeftModel around it), wrapped or not; it is not changed.
            call: the call's arguments; None for a call without images.

        Raises:
            ValueError: the budget does not fit the model, or the config asks for a calibration
                that its language model cannot have.
        """
        adapter, call = self.adapter, call or {}
        names = (*adapter.vision_inputs, *adapter.feature_options)
        inputs = {name: call[name] for name in names if call.get(name) is not None}
        algorithm = algorithms.get(self.config.algorithm)
        if self.config.by_pixels:
            adapter.looked_at(model, {})  # refused here where it is not available
        shape = adapter.tower_shape(model, **adapter.options_of(inputs))
        return CallPlan(
            model=model,
            merging=self,
            inputs=inputs,
            algorithm=algorithm,
            shape=shape,
            schedule=schedule_for(self.config, shape, algorithm),
            calibration=self._calibration(model, algorithm),
        )

    def _calibration(self, model: Any, algorithm: Algorithm) -> Calibration:
        if self.adapter.calls == "encoder":
            return self._nobody_to_tell()
        text_config = self.adapter.text_config(model)
        # The original code base's forward names its arguments and hands no others on.
        found = resolve(
            self.config,
            text_config,
            wanted=algorithm.calibrated,
            channels=self.adapter.calls == "transformers",
        )
        if self.carrier == "mask" and found.carrier == "channels":
            raise ValueError(
                "the language model's attention implementation is "
                f"{text_config._attn_implementation!r} since wrap() was called; call "
                "pitome_vlm.wrap(model, ...) again, so that it is told the sizes of merged tokens"
            )
        if not self.adapter.own_positions or found.positions != "compact":
            return found
        if self.config.positions == "compact":
            raise ValueError(
                "positions='compact' is not available for this model, which places tokens by the "
                "grid of their image; use 'mean', 'median' or 'original'"
            )
        return dataclasses.replace(found, positions="mean")

    def _nobody_to_tell(self) -> Calibration:
        config = self.config
        asked = {"size_bias": config.size_bias or None, "positions": config.positions}
        for name, value in asked.items():
            if value not in (None, "compact"):
                raise ValueError(
                    f"{name}={value!r} tells a language model about merged tokens, which an "
                    "encoder on its own has not; leave it out"
                )
        return Calibration(False, "compact")


def note_of(model: Any, merging: Merging) -> str:
    """What is on a model, in a few words for `print(model)`."""
    note = f"pitome: {merging.config.summary()}"
    try:
        schedule, unit = merging.plan(model).schedule, merging.adapter.counted_per
    except (TypeError, ValueError) as error:
        # The model's config was changed after wrap; printing a model must not fail for it.
        return f"{note}, not applicable: {error}"
    return f"{note}, {schedule.tokens_in} -> {schedule.counts_out} visual tokens per {unit}"


@dataclass(frozen=True)
class CallPlan:
    """What one call needs to know, the same from its first line to its last.

    Attributes:
        model: the model itself.
        merging: what `wrap` put on it.
        inputs: the arguments of the call that decide its visual tokens.
        algorithm: who decides what is merged.
        shape: numbers of the vision tower, read as this call asks for.
        schedule: token counts per image (or tile).
        calibration: what the language model is told about merged tokens.
    """

    model: Any
    merging: Merging
    inputs: Mapping[str, Any]
    algorithm: Algorithm
    shape: TowerShape
    schedule: Schedule
    calibration: Calibration

    @property
    def config(self) -> MergeConfig:
        """The options."""
        return self.merging.config

    @property
    def adapter(self) -> Adapter:
        """The model family."""
        return self.merging.adapter

    def masks(self) -> Masks:
        """How the language model's masks are made."""
        config = self.adapter.text_config(self.model)
        return Masks.of(self.model, config, one=self.adapter.one_mask)

    def new_pass(self) -> MergePass:
        """A fresh pass for one encoding."""
        watch = self.merging.watch
        own = self.algorithm
        return new_pass(self.config, self.schedule, self.shape.grid, algorithm=own, watch=watch)

    def counts(self) -> dict[str, list[TokenCount]]:
        """Tokens of everything the call brings, by kind; nothing is run.

        Raises:
            ValueError: an input is missing.
        """
        footprints = self.adapter.footprints(self.model, self.inputs)
        if self.config.by_pixels:
            return {
                kind: [
                    self.with_keep(keep).new_pass().count(footprint)
                    for keep, footprint in zip(keeps_of(self)[kind], found, strict=True)
                ]
                for kind, found in footprints.items()
            }
        merge_pass = self.new_pass()
        return {
            kind: [merge_pass.count(footprint) for footprint in found]
            for kind, found in footprints.items()
        }

    def with_keep(self, keep: float) -> CallPlan:
        """The plan of a call whose images all keep a fixed fraction."""
        merging = dataclasses.replace(self.merging, config=self.config.replace(keep=keep))
        schedule = schedule_for(merging.config, self.shape, self.algorithm)
        return dataclasses.replace(self, merging=merging, schedule=schedule)

    def is_identity(self) -> bool:
        """Whether the call's images all keep all their tokens, so that nothing has to be done."""
        if not self.merging.has_pixels(self.inputs):
            return self.schedule.is_identity
        return all(count.is_identity for counts in self.counts().values() for count in counts)

    def encode(self, cache: ImageCache | None = None) -> list[Encoded]:
        """The visual tokens of the call by kind, merged as configured.

        Args:
            cache: where to look first; None for nowhere.

        Raises:
            TypeError: `cache` is no `ImageCache`.
        """

        def run() -> list[Encoded]:
            watch = self.merging.watch
            with contextlib.nullcontext() if watch is None else watch("encode"):
                if self.config.by_pixels:
                    return encode_by_pixels(self)
                return self.adapter.encode(self.model, self.inputs, self.new_pass())

        if cache is None:
            return run()
        if not isinstance(cache, ImageCache):
            raise TypeError(
                f"{IMAGE_CACHE} must be a pitome_vlm.ImageCache, got {type(cache).__name__}"
            )
        seen = {n: one for n, one in self.inputs.items() if n not in self.adapter.place_inputs}
        return cache.find(self.model, self.config, seen, run)

    @contextlib.contextmanager
    def unmerged(self) -> Iterator[None]:
        """For the model's own code on a call whose images keep all their tokens.

        Leaves out the layers after the feature layer where the config asks for that.
        """
        with contextlib.ExitStack() as stack:
            if self.config.skip_unused_layers and self.merging.has_pixels(self.inputs):
                everything = self
                if not self.schedule.is_identity:
                    nothing = Merging(MergeConfig(keep=1.0), self.adapter)
                    everything = nothing.plan(self.model, self.inputs)
                merge_pass = everything.new_pass()
                for tower in self.adapter.parts(self.model).towers:
                    stack.enter_context(encoding(tower, merge_pass))
            yield


def keeps_of(plan: CallPlan) -> dict[str, list[float]]:
    """With adapt="pixels", the fraction of its tokens that each image of a call keeps, by kind.

    Raises:
        ValueError: the model's family has no pixels to look at.
    """
    grid = patch_grid(plan.adapter.parts(plan.model).vision_config)
    seen = plan.adapter.looked_at(plan.model, plan.inputs)
    return {
        kind: [keep_of(one, grid, plan.config.keep_range) for one in pixels]
        for kind, pixels in seen.items()
    }


def encode_by_pixels(plan: CallPlan) -> list[Encoded]:
    """With adapt="pixels", the visual tokens of a call; images of one budget go together."""
    encoded = []
    for kind, keeps in keeps_of(plan).items():
        parts, order = [], []
        for keep in dict.fromkeys(keeps):
            members = [index for index, own in enumerate(keeps) if own == keep]
            chosen = plan.adapter.select(plan.model, plan.inputs, kind, members)
            own = plan.with_keep(keep)
            (found,) = plan.adapter.encode(plan.model, chosen, own.new_pass())
            parts.append(found.visual)
            order += members
        back = sorted(range(len(order)), key=order.__getitem__)
        visual = VisualTokens.joined(parts, back)
        encoded.append(dataclasses.replace(found, visual=visual))
    return encoded
