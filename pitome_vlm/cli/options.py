"""Options that several commands share, and how their text is read.

Importing this module imports neither torch nor a model, so that `--help` answers at once.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..common import suggest
from ..merge.config import BUDGET_WORDS, PRESETS, SHARED, MergeConfig, option_names
from .session import is_first_process
from .terminal import loading_libraries, say

DTYPES = ("float32", "float16", "bfloat16")
_SHORT_DTYPES = {
    "fp32": "float32", "float": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16",
}  # fmt: skip


def panel(title: str | None) -> Callable[..., Any]:
    """How options of one panel of `--help` are made; None for the panel without a title.

    The result takes the help text, the metavar, and the names where they are not the parameter's.
    """

    def option(text: str, metavar: str | None = None, *names: str, **more: Any) -> Any:
        return typer.Option(*names, metavar=metavar, help=text, rich_help_panel=title, **more)

    return option


def _fraction_or_auto(text: str) -> float | str:
    if str(text) == "auto":
        return "auto"
    try:
        return float(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is neither a number nor 'auto'") from error


def _known_dtype(name: str | None) -> str | None:
    if name is None or name in DTYPES:
        return name
    meant = _SHORT_DTYPES.get(name.lower())
    hint = f" Did you mean {meant!r}?" if meant else suggest(name, list(DTYPES))
    raise typer.BadParameter(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}.{hint}")


plain = panel(None)
_budget = panel("Visual tokens (give one of keep, tokens, ratio)")
loading = panel("Loading")
_answer = panel("Answer")
message = panel("Messages")


def model_option(text: str, option: Callable[..., Any] = plain) -> Any:
    """`--model` with a help text of its own."""
    return option(text, "PATH", "--model", "-m")


def image_option(text: str, option: Callable[..., Any] = plain) -> Any:
    """`--image` with a help text of its own."""
    return option(text, "FILE", "--image", "-i")


def output_option(text: str) -> Any:
    """`--output` with a help text of its own."""
    return plain(text, "DIR", "--output", "-o")


Model = Annotated[
    str,
    model_option("Folder or Hub name of a checkpoint or adapter, or `demo` for the bundled one."),
]
Keep = Annotated[
    Any,
    _budget(
        "Fraction of the visual tokens to keep, above 0 and up to 1 (1 merges nothing); "
        "`auto` chooses a count for each image.",
        "F",
        parser=_fraction_or_auto,
    ),
]
Quality = Annotated[
    float | None,
    _budget("With --keep auto: fraction of each image's variance to preserve, 0 to 1.", "F"),
]
Tokens = Annotated[int | None, _budget("Visual tokens to keep per image.", "N")]
Ratio = Annotated[
    float | None, _budget("The paper's r: fraction of the tokens kept at every merging layer.", "R")
]
Algorithm = Annotated[
    str | None,
    _budget(
        "Merging algorithm, for instance pitome_plus (default), pitome or tome; `pitome-vlm "
        "info --list-algorithms` shows all.",
        "NAME",
    ),
]
Preset = Annotated[
    str | None,
    _budget("`paper` for the algorithm as published, `released` for the authors' code.", "NAME"),
]
MergeOption = Annotated[
    list[str] | None,
    _budget(
        "Another merge option, such as stage=tower or an option of the algorithm; can be repeated.",
        "NAME=VALUE",
        "--option",
    ),
]
Algorithms = Annotated[
    str | None,
    plain(
        "Merging algorithms to compare, for instance pitome_plus,tome; `pitome-vlm info "
        "--list-algorithms` shows all.",
        "NAME,NAME",
    ),
]
Load4Bit = Annotated[
    bool,
    loading("Quantise the language model to 4 bits (needs bitsandbytes).", None, "--load-4bit"),
]
Load8Bit = Annotated[
    bool,
    loading("Quantise the language model to 8 bits (needs bitsandbytes).", None, "--load-8bit"),
]
Dtype = Annotated[
    str | None,
    loading(
        "Number format of the weights: float32, float16 or bfloat16; default: the checkpoint's.",
        "NAME",
        callback=_known_dtype,
    ),
]
Device = Annotated[
    str | None,
    loading(
        "Device to run on, for instance cpu or cuda:1; default: the accelerator if there is one.",
        "NAME",
    ),
]
MaxNewTokens = Annotated[int, _answer("Longest answer in tokens.", "N", min=1)]
Temperature = Annotated[
    float, _answer("Sampling temperature; 0 always takes the most likely token.", "T", min=0.0)
]
Verbose = Annotated[bool, message("Print details to stderr.", None, "--verbose", "-v")]
AsJson = Annotated[bool, plain("Print JSON to stdout instead of tables.", None, "--json")]
# Text and not paths: a path would lose one slash of an address, which is then no address any more.
Images = Annotated[list[str], image_option("Image file; can be repeated.")]
MaybeImages = Annotated[list[str] | None, image_option("Image file; can be repeated.")]
ImageSize = Annotated[
    str | None,
    plain(
        "Image size in pixels, for models whose token count depends on it; default: 1024x768.",
        "WIDTHxHEIGHT",
    ),
]
Resume = Annotated[
    bool, plain("Resume the run in the output folder; what is finished is kept.", None, "--resume")
]
Overwrite = Annotated[
    bool, plain("Replace the results of an earlier run in the output folder.", None, "--overwrite")
]
Plot = Annotated[
    bool, plain("Whether to draw a plot (needs matplotlib).", None, "--plot/--no-plot")
]


@dataclass(frozen=True)
class Loading:
    """How a checkpoint is loaded; the names are arguments of `session.load_model`."""

    load_4bit: Load4Bit = False
    load_8bit: Load8Bit = False
    dtype: Dtype = None
    device: Device = None


@dataclass(frozen=True)
class FixedMerging:
    """What is merged, where every image gets as many tokens."""

    keep: Keep = None
    tokens: Tokens = None
    ratio: Ratio = None
    algorithm: Algorithm = None
    preset: Preset = None
    option: MergeOption = None

    def given(self) -> dict[str, Any]:
        """See `merge_options`."""
        return merge_options(**vars(self))


@dataclass(frozen=True)
class Merging(FixedMerging):
    """What is merged, `--keep auto` included."""

    quality: Quality = None


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """A command for typer, in which every field of a dataclass is an option."""
    options: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        group: Any = parameter.annotation
        if not (isinstance(group, type) and dataclasses.is_dataclass(group)):
            options.append(parameter)
            continue
        groups[name] = group
        options += inspect.signature(group, eval_str=True).parameters.values()

    @functools.wraps(command)
    def run(**values: Any) -> None:
        for name, group in groups.items():
            fields = [field.name for field in dataclasses.fields(group)]
            values[name] = group(**{field: values.pop(field) for field in fields})
        command(**values)

    run.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    run.__annotations__ = {option.name: option.annotation for option in options}
    return run


def merge_options(
    keep: float | str | None = None,
    tokens: int | None = None,
    ratio: float | None = None,
    algorithm: str | None = None,
    preset: str | None = None,
    quality: float | None = None,
    option: list[str] | None = None,
) -> dict[str, Any]:
    """What was given about merging, by the names of `MergeConfig` and `preset`.

    Everything that can be checked without a model is checked. Empty where nothing was given.
    """
    if algorithm or preset or option:
        # Only an algorithm knows its options, and it is written in torch.
        loading_libraries()
    flags = {
        "keep": keep, "tokens": tokens, "ratio": ratio, "algorithm": algorithm, "quality": quality,
    }  # fmt: skip
    given = {name: value for name, value in flags.items() if value is not None}
    for text in option or []:
        name, value = pair("option", text)
        if name in given:
            raise ValueError(f"{name} is given twice, the second time by --option {text}")
        given[name] = value
    if quality is not None and keep != "auto":
        raise ValueError("--quality is used with --keep auto only; add that or leave it out")
    if preset is not None and preset not in PRESETS:
        MergeConfig.preset(preset)
    if preset is not None and "algorithm" in given:
        raise ValueError(f"--preset {preset} fixes the algorithm; leave out it or --algorithm")
    # The budget may come from the checkpoint; any will do to check the rest.
    budget: dict[str, Any] = {} if given.keys() & set(BUDGET_WORDS) else {"keep": 1.0}
    checked = {**PRESETS.get(preset or "", {}), **budget, **given}
    if "algorithm" not in checked and not given.keys() <= set(SHARED):
        # So may the algorithm, with options that the default one does not have.
        others = set(option_names()) - set(option_names(MergeConfig(keep=1.0).algorithm))
        checked = {name: value for name, value in checked.items() if name not in others}
    MergeConfig.from_dict(checked)
    return given if preset is None else {"preset": preset, **given}


def check_run_flags(resume: bool, overwrite: bool, folder: Path) -> None:
    """Refuse `--resume` with `--overwrite`; say so if there is nothing to resume."""
    if resume and overwrite:
        raise ValueError("--resume continues a run and --overwrite replaces it; give one of them")
    empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if resume and empty and is_first_process():
        say(f"nothing to resume in {folder}, starting")


def words(field: str, text: str) -> list[str]:
    """The words of a comma list."""
    found = [word.strip() for word in text.split(",")]
    if not all(found):
        raise ValueError(f"{field} must be separated by single commas, got {text!r}")
    return found


def fractions(field: str, text: str) -> list[float]:
    """The numbers of a comma list."""
    try:
        return [float(word) for word in words(field, text)]
    except ValueError:
        raise ValueError(f"{field} must be numbers separated by commas, got {text!r}") from None


def counts(field: str, text: str) -> list[int]:
    """The whole numbers of a comma list, each at least 1."""
    found = words(field, text)
    for word in found:
        if not (word.isascii() and word.isdigit() and int(word)):
            raise ValueError(f"{field} must be whole numbers of at least 1, got {word!r}")
    return [int(word) for word in found]


def pairs(field: str, text: str) -> dict[str, Any]:
    """`NAME=VALUE,NAME=VALUE` by name; see `pair`."""
    return dict(pair(field, word) for word in text.split(",") if word.strip())


def pair(field: str, text: str) -> tuple[str, Any]:
    """`NAME=VALUE` with a Python value where it is one; true and false in any case."""
    name, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not name:
        raise ValueError(f"{field} must be NAME=VALUE, got {text.strip()!r}")
    # As a string "false" would count as true.
    value = value.capitalize() if value.lower() in ("true", "false") else value
    with contextlib.suppress(ValueError, SyntaxError):
        return name, ast.literal_eval(value)
    return name, value


def image_size_of(text: str | None) -> tuple[int, int] | None:
    """(height, width) of a size that people write as "1024x768"."""
    if text is None:
        return None
    parts = [part.strip() for part in text.lower().split("x")]
    numbers = [int(part) for part in parts if part.isascii() and part.isdigit()]
    if len(parts) != 2 or len(numbers) != 2 or min(numbers) < 1:
        raise ValueError(
            f"image-size must be WIDTHxHEIGHT in whole pixels, such as 1024x768, got {text!r}"
        )
    width, height = numbers
    return height, width
