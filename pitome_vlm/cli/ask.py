"""`pitome-vlm ask`: one question, one answer on stdout.

Knows: its options. Does not know: prompts or models.
"""

from __future__ import annotations

import time
from typing import Annotated

import typer

from . import options as o
from .terminal import quiet, say, write


def ask(
    question: Annotated[str, typer.Argument(help="What to ask about the picture.")],
    model: o.Model,
    image: o.Images,
    keep: o.Keep = None,
    tokens: o.Tokens = None,
    ratio: o.Ratio = None,
    algorithm: o.Algorithm = None,
    preset: o.Preset = None,
    quality: o.Quality = None,
    load_4bit: o.Load4Bit = False,
    load_8bit: o.Load8Bit = False,
    dtype: o.Dtype = None,
    device: o.Device = None,
    max_new_tokens: o.MaxNewTokens = 128,
    temperature: o.Temperature = 0.0,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
) -> None:
    """Ask one question about a picture; only the answer goes to stdout.

    Example: `pitome-vlm ask --model demo --image scene.png --keep 0.25 "how many stars are there?"`
    """
    del debug  # read by the command group
    merging = o.MergeOptions(keep, tokens, ratio, algorithm, preset, quality).given()
    from .session import load_images, load_model, merging_line

    pictures = load_images(image)
    loading = o.LoadOptions(model, load_4bit, load_8bit, dtype, device)
    vlm, processor = load_model(loading, merging, verbose=verbose)
    from .engine import Conversation

    conversation = Conversation(vlm, processor, max_new_tokens, temperature, pictures)
    if verbose:
        say(merging_line(vlm))
    started = time.perf_counter()
    with quiet(verbose):
        answer = conversation.ask(question)
    write(answer)
    if verbose:
        say(f"answered in {time.perf_counter() - started:.2f} s")
