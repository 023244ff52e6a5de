"""`pitome-vlm chat`: a conversation in the terminal.

Handles lines, slash commands and Ctrl-C, and leaves prompts and generation to `engine.py`. Answers
go to stdout, everything else to stderr; without a terminal, lines are read from stdin.
"""

from __future__ import annotations

import contextlib
import importlib
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..common import counted, suggest
from . import options as o
from . import videos as v
from .terminal import one_line, quiet, say, write

if TYPE_CHECKING:
    from .engine import Conversation

HELP = {
    "/image PATH ...": "show one or more other images; starts a new conversation",
    "/video PATH ...": "the same with videos",
    "/keep F": "keep this fraction of the visual tokens, 0 to 1; auto: each image its own",
    "/tokens N": "keep this many visual tokens per image",
    "/algorithm NAME": "merge with another algorithm",
    "/reset": "forget the conversation, keep the image",
    "/info": "show what is merged and the length of the conversation",
    "/help": "show this list",
    "/exit": "leave (or press Ctrl-D); Ctrl-C stops an answer",
}


def chat(
    context: typer.Context,
    model: o.Model,
    image: o.MaybeImages = None,
    video: v.Videos = None,
    frames: v.Frames = 8,
    temporal: v.Temporal = False,
    merging: o.Merging = o.Merging(),
    loading: o.Loading = o.Loading(),
    max_new_tokens: o.MaxNewTokens = 512,
    temperature: o.Temperature = 0.0,
    verbose: o.Verbose = False,
) -> None:
    """Talk about an image or a video; answers appear word by word.

    Without a budget, a quarter of the visual tokens is kept, or what the checkpoint's own
    pitome_config.json says; --keep 1 merges nothing.

    Commands during the conversation: /image PATH, /video PATH, /keep 0.25, /keep auto, /tokens N,
    /algorithm NAME, /reset, /info, /help, /exit.

    Example: `pitome-vlm chat --model demo --image scene.png --keep 0.25`
    """
    given = merging.given() | v.temporal_option(temporal, video)
    from .session import load_images, load_merging

    images, videos = load_images(image or []), v.load_videos(video or [], frames)
    vlm, processor = load_merging(model, given, announce=True, verbose=verbose, **vars(loading))
    v.check_videos(vlm, videos)
    from .engine import Conversation

    conversation = Conversation(vlm, processor, max_new_tokens, temperature, images, videos)
    say(f"{model} is ready; /help lists the commands.")
    if not images and not videos:
        say("No image yet; show one with /image PATH.")
    Chat(conversation, frames, debug=bool(context.obj), verbose=verbose).run()


class Chat:
    """Reads lines and answers them; an error in one line does not end the conversation."""

    def __init__(
        self,
        conversation: Conversation,
        frames: int = 8,
        *,
        debug: bool = False,
        verbose: bool = False,
    ) -> None:
        self.conversation = conversation
        self.frames = frames
        self.debug = debug
        self.verbose = verbose
        self.commands: dict[str, Callable[[str], None]] = {
            "/image": self._image,
            "/video": self._video,
            "/keep": lambda value: self._budget(keep=_keep(value)),
            "/tokens": lambda value: self._budget(tokens=_number(value, int, "/tokens 64")),
            "/algorithm": self._algorithm,
            "/reset": self._reset,
            "/info": self._info,
            "/help": self._help,
        }

    def run(self) -> None:
        """Read lines until /exit, the end of the input, or Ctrl-C twice at the prompt."""
        interactive = sys.stdin.isatty()
        if interactive:
            # Line editing and history for input(); missing on some platforms.
            with contextlib.suppress(ImportError):
                importlib.import_module("readline")
        interrupted = False
        while True:
            try:
                line = input("> " if interactive else "").strip()
            except EOFError:
                if interactive:
                    say("")
                return
            except KeyboardInterrupt:
                if interrupted or not interactive:
                    return
                interrupted = True
                say("\nCtrl-D or /exit leaves, and so does a second Ctrl-C")
                continue
            interrupted = False
            if line in ("/exit", "/quit"):
                return
            if line:
                self.handle(line)

    def handle(self, line: str) -> None:
        """Handle one question or command; an error is one line and changes nothing else."""
        try:
            self._command(line) if line.startswith("/") else self._answer(line)
        except KeyboardInterrupt:
            say("stopped")
        except Exception as error:
            # The conversation must outlive any failure, running out of memory included.
            if self.debug:
                import traceback

                traceback.print_exc()
            say(f"error: {one_line(str(error)) or type(error).__name__}")

    def _answer(self, question: str) -> None:
        with stopping_on_interrupt() as stop, quiet(self.verbose):
            answer = self.conversation.ask(
                question, on_text=lambda text: write(text, end="", fold=False), stop=stop
            )
        write("")
        if stop.is_set():
            say("stopped")
        elif not answer:
            say("(the model gave an empty answer)")
        say(self.conversation.cost())

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name not in self.commands:
            known = [*self.commands, "/exit"]
            raise ValueError(
                f"unknown command {name}.{suggest(name, known)} Commands: {', '.join(known)}"
            )
        self.commands[name](rest.strip())

    def _image(self, paths: str) -> None:
        from .session import load_images

        names = _split(paths)
        if not names:
            raise ValueError("/image needs the path of an image: /image PATH")
        self.conversation.show(load_images(names))
        sizes = ", ".join(f"{i.width} x {i.height}" for i in self.conversation.images)
        say(f"Showing {', '.join(names)} ({sizes}); this is a new conversation")

    def _video(self, paths: str) -> None:
        names = _split(paths)
        if not names:
            raise ValueError("/video needs the path of a video: /video PATH")
        videos = v.load_videos(names, self.frames)
        v.check_videos(self.conversation.model, videos)
        self.conversation.show(videos=videos)
        counts = ", ".join(f"{len(one.frames)} frames" for one in videos)
        say(f"Showing {', '.join(names)} ({counts}); this is a new conversation")

    def _budget(self, **budget: Any) -> None:
        from ..wrapping.wrap import is_wrapped, merge_config, wrap
        from .session import merging_line

        model = self.conversation.model
        wrap(model, config=merge_config(model) if is_wrapped(model) else None, **budget)
        say(merging_line(model))

    def _algorithm(self, name: str) -> None:
        if not name:
            raise ValueError("/algorithm needs a name: /algorithm tome")
        from ..merge import algorithms
        from ..merge.config import DEFAULT_KEEP
        from ..wrapping.wrap import is_wrapped

        algorithms.get(name)
        budget = {} if is_wrapped(self.conversation.model) else {"keep": DEFAULT_KEEP}
        self._budget(algorithm=name, **budget)

    def _reset(self, rest: str) -> None:
        del rest
        self.conversation.reset()
        say("Conversation forgotten")

    def _info(self, rest: str) -> None:
        del rest
        from .session import merging_line

        talk = self.conversation
        images, turns = counted(len(talk.images), "image"), counted(len(talk.turns), "turn")
        videos = f", {counted(len(talk.videos), 'video')}" if talk.videos else ""
        say(f"{merging_line(talk.model)}; {images}{videos}, {turns}")

    def _help(self, rest: str) -> None:
        del rest
        for command, text in HELP.items():
            say(f"  {command:<16} {text}")


def _keep(text: str) -> float | str:
    return "auto" if text == "auto" else float(_number(text, float, "/keep 0.25 or /keep auto"))


def _number(text: str, kind: type, example: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        what = "a number" if kind is float else "a whole number"
        raise ValueError(f"give {what}, as in {example}; got {text!r}") from None


def _split(text: str) -> list[str]:
    """File names from a line: one per word, spaces inside quotes; a bare name may have spaces."""
    if Path(text).is_file():
        return [text]
    try:
        return shlex.split(text)
    except ValueError:
        return [text]


@contextlib.contextmanager
def stopping_on_interrupt() -> Iterator[threading.Event]:
    """Ctrl-C sets the event; a second one raises KeyboardInterrupt as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handler(number: int, frame: Any) -> None:
        if stop.is_set():
            signal.default_int_handler(number, frame)
        stop.set()

    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)
