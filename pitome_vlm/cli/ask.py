"""`pitome-vlm ask`: one question, one answer on stdout."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from . import options as o
from .terminal import quiet, say, write


def ask(
    question: Annotated[str, typer.Argument(help="Question about the image.")],
    model: o.Model,
    image: o.Images,
    keep: o.Keep = None,
    tokens: o.Tokens = None,
    ratio: o.Ratio = None,
    algorithm: o.Algorithm = None,
    preset: o.Preset = None,
    quality: o.Quality = None,
    option: o.MergeOption = None,
    load_4bit: o.Load4Bit = False,
    load_8bit: o.Load8Bit = False,
    dtype: o.Dtype = None,
    device: o.Device = None,
    max_new_tokens: o.MaxNewTokens = 128,
    temperature: o.Temperature = 0.0,
    verbose: o.Verbose = False,
) -> None:
    """Ask one question about an image; only the answer goes to stdout.

    Without a budget, a quarter of the visual tokens is kept, or what the checkpoint's own
    pitome_config.json says; --keep 1 merges nothing.

    Example: `pitome-vlm ask --model demo --image scene.png --keep 0.25 "how many stars are there?"`
    """
    merging = o.merge_options(keep, tokens, ratio, algorithm, preset, quality, option)
    if not question.strip():
        raise ValueError("the question is empty")
    from .session import load_images, load_merging

    images = load_images(image)
    vlm, processor = load_merging(
        model,
        merging,
        load_4bit=load_4bit,
        load_8bit=load_8bit,
        dtype=dtype,
        device=device,
        verbose=verbose,
    )
    from .engine import Conversation

    conversation = Conversation(vlm, processor, max_new_tokens, temperature, images)
    started = time.perf_counter()
    with quiet(verbose):
        answer = conversation.ask(question)
    write(answer)
    if verbose:
        say(f"Answered in {time.perf_counter() - started:.2f} s")
