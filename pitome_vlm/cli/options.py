"""Options that several commands share, and the objects they become.

Knows: names, help texts and panels of options. Does not know: torch or models.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..merge.config import MergeConfig

_BUDGET = "Visual tokens (give one of keep, tokens, ratio)"
_LOADING = "Loading"
_ANSWER = "Answer"
_MESSAGES = "Messages"

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="PATH",
        help="Folder or Hub name of a LLaVA checkpoint, or `demo` for the bundled one.",
    ),
]


def _fraction_or_auto(text: str) -> float | str:
    """What --keep takes.

    Raises:
        BadParameter: neither a number nor "auto".
    """
    if str(text) == "auto":
        return "auto"
    try:
        return float(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is neither a number nor 'auto'") from error


Keep = Annotated[
    Any,
    typer.Option(
        metavar="F",
        parser=_fraction_or_auto,
        help="Fraction of the visual tokens to keep, 0 to 1, or auto: as few as each picture "
        "allows.",
        rich_help_panel=_BUDGET,
    ),
]
Quality = Annotated[
    float | None,
    typer.Option(
        help="With --keep auto: share of a picture's variance to keep, 0 to 1.",
        rich_help_panel=_BUDGET,
    ),
]
Tokens = Annotated[
    int | None,
    typer.Option(help="Visual tokens to keep per image.", rich_help_panel=_BUDGET),
]
Ratio = Annotated[
    float | None,
    typer.Option(
        help="The paper's r: fraction kept at every merging layer.", rich_help_panel=_BUDGET
    ),
]
Algorithm = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="pitome_plus (default), pitome, tome, visionzip, ...; a wrong name lists all.",
        rich_help_panel=_BUDGET,
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="paper, or released (what the authors published as code).",
        rich_help_panel=_BUDGET,
    ),
]
Load4Bit = Annotated[
    bool,
    typer.Option(
        "--load-4bit", help="Quantise to 4 bits (bitsandbytes).", rich_help_panel=_LOADING
    ),
]
Load8Bit = Annotated[
    bool,
    typer.Option(
        "--load-8bit", help="Quantise to 8 bits (bitsandbytes).", rich_help_panel=_LOADING
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="float32, float16, bfloat16; default: the checkpoint's.",
        rich_help_panel=_LOADING,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="For instance cpu; default: the best there is.",
        rich_help_panel=_LOADING,
    ),
]
MaxNewTokens = Annotated[
    int, typer.Option(min=1, help="Longest answer, in tokens.", rich_help_panel=_ANSWER)
]
Temperature = Annotated[
    float,
    typer.Option(
        min=0.0, help="0 takes the most likely token; above it samples.", rich_help_panel=_ANSWER
    ),
]
Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="Details on stderr.", rich_help_panel=_MESSAGES),
]
Debug = Annotated[
    bool,
    typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=_MESSAGES),
]
Images = Annotated[
    list[Path],
    typer.Option("--image", "-i", metavar="FILE", help="A picture; may be given several times."),
]
MaybeImages = Annotated[
    list[Path] | None,
    typer.Option("--image", "-i", metavar="FILE", help="A picture; may be given several times."),
]


@dataclass(frozen=True)
class MergeOptions:
    """What the user said about merging; all None means nothing at all."""

    keep: float | str | None = None
    tokens: int | None = None
    ratio: float | None = None
    algorithm: str | None = None
    preset: str | None = None
    quality: float | None = None

    def given(self, default_keep: float | None = None) -> dict[str, Any]:
        """What to hand to `load` and `wrap`, checked as far as it can be without a model.

        Args:
            default_keep: budget where none was given.

        Raises:
            ValueError: a value out of range, two budgets, or an unknown name.
        """
        words = {name: getattr(self, name) for name in ("keep", "tokens", "ratio")}
        budget = {name: value for name, value in words.items() if value is not None}
        if not budget and self.algorithm == "none":
            budget = {"keep": 1.0}
        elif not budget and default_keep is not None:
            budget = {"keep": default_keep}
        values: dict[str, Any] = dict(budget)
        if self.algorithm is not None:
            values["algorithm"] = self.algorithm
        if self.quality is not None:
            if self.keep != "auto":
                raise ValueError("--quality belongs to --keep auto; leave it out, or add that")
            values["quality"] = self.quality
        if self.preset is not None:
            return {"config": MergeConfig.preset(self.preset, **values)}
        if budget:
            MergeConfig(**values)
        return values


@dataclass(frozen=True)
class LoadOptions:
    """What the user said about loading."""

    model: str
    load_4bit: bool = False
    load_8bit: bool = False
    dtype: str | None = None
    device: str | None = None
