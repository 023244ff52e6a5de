"""`pitome-vlm ask`: one question, one answer on stdout."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from ..common import check_text
from . import options as o
from . import videos as v
from .terminal import quiet, say, write


def ask(
    question: Annotated[str, typer.Argument(help="Question about the image or video.")],
    model: o.Model,
    image: o.MaybeImages = None,
    video: v.Videos = None,
    frames: v.Frames = 8,
    temporal: v.Temporal = False,
    merging: o.Merging = o.Merging(),
    loading: o.Loading = o.Loading(),
    max_new_tokens: o.MaxNewTokens = 128,
    temperature: o.Temperature = 0.0,
    verbose: o.Verbose = False,
) -> None:
    """Ask one question about an image or a video; only the answer goes to stdout.

    Without a budget, a quarter of the visual tokens is kept, or what the checkpoint's own
    pitome_config.json says; --keep 1 merges nothing.

    Example: `pitome-vlm ask --model demo --image scene.png --keep 0.25 "how many stars are there?"`
    """
    given = merging.given() | v.temporal_option(temporal, video)
    if not image and not video:
        raise ValueError("nothing to ask about: give --image FILE, or --video FILE")
    if not check_text("the question", question).strip():
        raise ValueError("the question is empty")
    from .session import load_images, load_merging

    images, videos = load_images(image or []), v.load_videos(video or [], frames)
    vlm, processor = load_merging(model, given, verbose=verbose, **vars(loading))
    v.check_videos(vlm, videos)
    from .engine import Conversation

    conversation = Conversation(vlm, processor, max_new_tokens, temperature, images, videos)
    started = time.perf_counter()
    with quiet(verbose):
        answer = conversation.ask(question)
    write(answer)
    if verbose:
        say(f"Answered in {time.perf_counter() - started:.2f} s")
