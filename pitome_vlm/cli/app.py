"""All commands, and what happens when one fails: one line on stderr and exit code 2."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..common import __version__, suggest
from ..merge.config import SHARED, option_names
from .ask import ask
from .bench import bench
from .chat import chat
from .demo import demo
from .eval import evaluate
from .info import info
from .options import grouped
from .serve import serve
from .serve_args import serve_args
from .terminal import EXIT_INTERRUPTED, one_line, say
from .train import train
from .tune import tune
from .verify import verify
from .visualize import visualize
from .web import web

EXIT_ERROR = 2
DEBUG = "--debug"
# Errors whose message says everything; others are shown with the name of their class.
KNOWN_ERRORS = (ValueError, TypeError, OSError, ImportError, MemoryError)

# Phrases of messages, and what stands for them on the command line.
WORDING = {
    # For callers from Python.
    r" \(\w+=True\)": "",
    # Of the library that reads the command line.
    r"Got unexpected extra argument\S* \((.*)\)": r"Unexpected '\1': text with spaces needs "
    "quotes, and a value its option, such as --model demo",
    r"(Missing option '--model' / '-m')\.": r"\1; `--model demo` is the bundled one",
}

EPILOG = """
Examples:

  pitome-vlm demo

  pitome-vlm ask --model llava-hf/llava-1.5-7b-hf --image cat.jpg --keep 0.25 "What is it?"

  pitome-vlm chat --model PATH --image cat.jpg --tokens 64 --load-4bit

  pitome-vlm info --model PATH --keep 0.25

  pitome-vlm serve PATH --keep 0.25 --port 8000

`--model demo` is the tiny model that comes with the package and needs no download.
"""


class OneLineErrors(TyperGroup):
    """A command group that shows a traceback only with --debug; that is the context's `obj`."""

    def main(
        self,
        args: Any = None,
        prog_name: str | None = "pitome-vlm",
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command line; always ends in SystemExit unless `standalone_mode` is False."""
        # A result that the terminal's encoding cannot show must not be lost.
        with contextlib.suppress(AttributeError):
            sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
        words = list(sys.argv[1:] if args is None else args)
        # Read here once, so that it works before and after the name of every command.
        ours = words[: words.index("--")] if "--" in words else words
        extra["obj"] = debug = DEBUG in ours
        words = [word for word in ours if word != DEBUG] + words[len(ours) :]
        try:
            code = super().main(words, prog_name, complete_var, False, windows_expand_args, **extra)
        except (Exception, KeyboardInterrupt) as error:
            code = _report(error, debug=debug)
        except SystemExit as leaving:
            # click turns a closed pipe into exit code 1.
            if not isinstance(leaving.__context__, BrokenPipeError):
                raise
            code = _report(leaving.__context__, debug=debug)
        if standalone_mode:
            sys.exit(code if isinstance(code, int) else 0)
        return code

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            # Caught here because releases of typer differ in what they make of it further out.
            say("interrupted")
            raise typer.Exit(EXIT_INTERRUPTED) from None


def _report(error: BaseException, *, debug: bool) -> int:
    """Say what went wrong and return the exit code."""
    if isinstance(error, BrokenPipeError):
        # The reader has closed the pipe; keep the interpreter quiet when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        say("interrupted")
        return EXIT_INTERRUPTED
    if debug:
        traceback.print_exception(error)
    describe = getattr(error, "format_message", None)
    if hasattr(error, "possibilities") and hasattr(error, "option_name"):
        describe = functools.partial(_unknown_option, error)
    message = one_line(describe() if describe else str(error)) or type(error).__name__
    if not (describe or isinstance(error, KNOWN_ERRORS)):
        message = f"{type(error).__name__}: {message}"
        message += "" if debug else " (run again with --debug for the traceback)"
    for pattern, ours in WORDING.items():
        message = re.sub(pattern, ours, message)
    say(f"error: {message}")
    return EXIT_ERROR


def _unknown_option(error: Any) -> str:
    """What is said of an option that a command does not have, such as an option of merging."""
    options = getattr(getattr(error.ctx, "command", None), "params", ())
    flags = [word for option in options for word in (*option.opts, *option.secondary_opts)]
    name = error.option_name.lstrip("-").replace("-", "_")
    hint = suggest(error.option_name, flags)
    # Only an algorithm knows its options, and it is written in torch: too slow for a misspelling.
    if "--option" in flags and (name in SHARED or (not hint and name in option_names())):
        hint = f" Merge options are given with --option {name}=VALUE"
    return f"No such option: {error.option_name}.{hint}"


app = typer.Typer(
    cls=OneLineErrors,
    name="pitome-vlm",
    help="Faster vision-language models: merge visual tokens before the language model sees them.",
    epilog=EPILOG,
    add_completion=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pitome-vlm {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version and exit.", callback=_show_version, is_eager=True
        ),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option(DEBUG, help="Show the full traceback of an error; works with every command."),
    ] = False,
) -> None:
    """Faster vision-language models: merge visual tokens before the language model sees them."""
    del version, debug  # shown in --help; read by `OneLineErrors.main`
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


for _command in (demo, ask, chat, web, info, bench, visualize, tune, verify, train):
    app.command()(grouped(_command))
app.command("eval")(evaluate)
app.command("serve-args")(grouped(serve_args))
# What is not an option of ours is one of vLLM's. None of ours has one letter here: -tp or -dph
# would be taken apart into letters.
app.command(
    "serve",
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": ["--help"],
    },
)(grouped(serve))


def main() -> None:
    """Entry point of the console script and of `python -m pitome_vlm`."""
    app()
