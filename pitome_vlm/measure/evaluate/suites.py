"""What a sweep measures: methods, budgets, tasks, and the suite files that name them.

Handles the grammar of `--algorithms`, lmms-eval's `--config` files and the grid they span. Needs
neither torch nor lmms-eval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ...common import suggest, whole_number
from ...merge.config import BUDGET_WORDS, PRESETS, MergeConfig, option_names
from ..store import file_name

MODEL_ID = "pitome_llava"
BASELINE = "none"
SUITES = Path(__file__).resolve().parent / "suites"
_PRESET = "preset"
# The keys of an lmms-eval config that a sweep uses; those it replaces are simply not read.
_SHARED = ("model", "tasks", "batch_size", "gen_kwargs")


@dataclass(frozen=True)
class Setting:
    """One way to reduce tokens; `method` is as the user wrote it, for instance "random:seed=1"."""

    method: str
    config: MergeConfig

    @property
    def budget(self) -> str:
        """The budget as a short text, empty without reduction."""
        if self.method == BASELINE:
            return ""
        if self.config.tokens is not None:
            return str(self.config.tokens)
        word = "keep" if self.config.keep is not None else "ratio"
        return f"{word}={getattr(self.config, word)}"

    @property
    def name(self) -> str:
        """Method and budget, unique within a sweep."""
        return f"{self.method}-{self.budget}" if self.budget else self.method


@dataclass(frozen=True)
class Cell:
    """One evaluation: a task under a setting."""

    task: str
    setting: Setting

    @property
    def name(self) -> str:
        """Unique within a sweep."""
        return f"{self.task} {self.setting.name}"

    @property
    def file(self) -> str:
        """A file name without ending."""
        return file_name(f"{self.task}--{self.setting.name}")


@dataclass(frozen=True)
class Suite:
    """What a suite file says.

    Attributes:
        name: of the suite.
        tasks: lmms-eval task names.
        settings: what is compared, the unreduced model first.
        pretrained: checkpoint the file names, None if it names none.
        model_args: further model arguments, as text.
        batch_size: questions at a time.
        gen_kwargs: lmms-eval generation arguments, None for the tasks' own.
    """

    name: str
    tasks: tuple[str, ...]
    settings: tuple[Setting, ...]
    pretrained: str | None = None
    model_args: tuple[tuple[str, str], ...] = ()
    batch_size: int = 1
    gen_kwargs: str | None = None


def baseline() -> Setting:
    """The unreduced model."""
    return Setting(BASELINE, MergeConfig(keep=1.0, algorithm="none"))


def method_setting(method: str, tokens: int) -> Setting:
    """A method at a number of tokens.

    Args:
        method: an algorithm, a preset, or either with options: "random:seed=1".
        tokens: visual tokens per image.

    Raises:
        ValueError: unknown method or option, or a value out of range.
    """
    from ...merge import algorithms

    name, *options = method.split(":")
    values: dict[str, Any] = {}
    fixed = (*BUDGET_WORDS, "algorithm")
    for option in options:
        field, sign, value = option.partition("=")
        known = [f for f in option_names(_algorithm_of(name)) if f not in fixed]
        if not sign or field not in known:
            raise ValueError(
                f"algorithms: {method!r} must be NAME:field=value with a field of "
                f"{', '.join(known)}, got {option!r}.{suggest(field, known)}"
            )
        values[field] = _scalar(value)
    try:
        if name in PRESETS:
            return Setting(method, MergeConfig.preset(name, tokens=tokens, **values))
        if name not in algorithms.available():
            known = [*algorithms.available(), *PRESETS]
            raise ValueError(
                f"unknown method {name!r}.{suggest(name, known)} Available: {', '.join(known)}"
            )
        return Setting(
            method, MergeConfig.from_dict({"algorithm": name, "tokens": tokens, **values})
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"algorithms: {error}") from error


def _algorithm_of(method: str) -> str | None:
    """The algorithm of a method's name; None if there is none."""
    from ...merge import algorithms

    name = PRESETS.get(method, {}).get("algorithm", method)
    return name if name in algorithms.available() else None


def grid(methods: Sequence[str], tokens: Sequence[int]) -> tuple[Setting, ...]:
    """Every method at every budget, after the unreduced model that all are compared with."""
    reducing = [method for method in dict.fromkeys(methods) if method != BASELINE]
    if reducing and not tokens:
        raise ValueError(f"tokens must be given for {', '.join(reducing)}, for instance 192,128,64")
    budgets = sorted(dict.fromkeys(tokens), reverse=True)
    return (baseline(), *(method_setting(m, count) for count in budgets for m in reducing))


def cells(tasks: Sequence[str], settings: Sequence[Setting]) -> list[Cell]:
    """The cells of a sweep, task by task; refuses two that would share a file."""
    if not tasks:
        raise ValueError("tasks must name at least one task")
    made = [Cell(task, setting) for task in dict.fromkeys(tasks) for setting in settings]
    seen: dict[str, Cell] = {}
    for cell in made:
        if cell.file in seen:
            raise ValueError(f"{cell.name!r} and {seen[cell.file].name!r} are the same cell")
        seen[cell.file] = cell
    return made


def available() -> list[str]:
    """Names of the suites in the package."""
    return sorted(path.stem for path in SUITES.glob("*.yaml"))


def read_suite(name: str) -> Suite:
    """A suite of the package by name, or an lmms-eval `--config` file by path.

    Raises:
        ValueError: there is none, or the file is not a list of runs of `pitome_llava` that
            differ in their merge options only.
    """
    path = SUITES / f"{name}.yaml" if name in available() else Path(name)
    if not path.is_file():
        raise ValueError(
            f"suite must be one of {', '.join(available())} or a file, got {name!r}."
            + suggest(name, available())
        )
    try:
        runs = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    runs = runs if isinstance(runs, list) else [runs]
    if not runs or not all(isinstance(run, dict) for run in runs):
        raise ValueError(f"{path} must hold lmms-eval runs (a list of mappings)")
    try:
        return _suite(path.stem, runs)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def parse_model_args(text: str) -> dict[str, str]:
    """lmms-eval's `key=value,key=value` as texts; ValueError for a part that is none."""
    given: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, sign, value = part.partition("=")
        if not sign or not key or not value:
            raise ValueError(f"model_args must be key=value,key=value, got {part!r}")
        if key in given:
            raise ValueError(f"model_args: {key} is given twice")
        given[key] = value
    return given


def check_model_args(given: dict[str, str]) -> None:
    """Refuse model arguments that the sweep itself sets: merging, checkpoint, batch size."""
    options = {"pretrained": "--model", "batch_size": "--batch-size"}
    merging = option_names()
    for key in given:
        if key in merging:
            raise ValueError(
                f"model_args: {key} is set by the sweep; use --tokens and --algorithms "
                f"(for instance pitome:{key}=...)"
            )
        if key in options:
            raise ValueError(f"model_args: {key} is given by {options[key]}")


def _suite(name: str, runs: list[dict[str, Any]]) -> Suite:
    for key in _SHARED:
        if any(run.get(key) != runs[0].get(key) for run in runs):
            raise ValueError(f"the runs of a suite must agree on {key}")
    first = runs[0]
    if first.get("model") != MODEL_ID:
        raise ValueError(f"model must be {MODEL_ID}, got {first.get('model')!r}")
    tasks = str(first.get("tasks") or "").replace(" ", "").split(",")
    if not all(tasks):
        raise ValueError("tasks must be names separated by commas")
    arguments = [parse_model_args(str(run.get("model_args") or "")) for run in runs]
    merging = {*option_names(), _PRESET}
    plain = [{k: v for k, v in a.items() if k not in merging} for a in arguments]
    if any(other != plain[0] for other in plain):
        raise ValueError("the model_args of a suite's runs may differ in merge options only")
    settings = [_run_setting(a) for a in arguments]
    reduced = [setting for setting in settings if setting.method != BASELINE]
    pretrained = plain[0].pop("pretrained", None)
    return Suite(
        name,
        tuple(tasks),
        (baseline(), *reduced),
        pretrained,
        tuple(plain[0].items()),
        whole_number("batch_size", first.get("batch_size", 1), 1),
        first.get("gen_kwargs"),
    )


def _run_setting(arguments: dict[str, str]) -> Setting:
    values = {key: _scalar(arguments[key]) for key in option_names() if key in arguments}
    preset = arguments.get(_PRESET)
    if preset is not None:
        return Setting(preset, MergeConfig.preset(preset, **values))
    if not values or values.get("algorithm") == BASELINE or values == {"keep": 1}:
        return baseline()
    config = MergeConfig.from_dict(values)
    shown = (f"{k}={v}" for k, v in values.items() if k not in (*BUDGET_WORDS, "algorithm"))
    return Setting(":".join([config.algorithm, *shown]), config)


def _scalar(text: str) -> Any:
    return yaml.safe_load(text)
