"""`pitome-vlm web`: the page in the browser, on this machine only."""

from __future__ import annotations

import contextlib
from typing import Annotated

from ..common import require
from . import options as o
from .session import DEMO
from .terminal import quiet, say, write


def web(
    model: o.Model = DEMO,
    port: Annotated[
        int, o.plain("Port on 127.0.0.1; 0 takes a free one.", "N", min=0, max=65535)
    ] = 7860,
    merging: o.FixedMerging = o.FixedMerging(),
    loading: o.Loading = o.Loading(),
    max_new_tokens: o.MaxNewTokens = 64,
    verbose: o.Verbose = False,
) -> None:
    """Ask a model in the browser, with and without merging: answers, times, what was merged.

    The page is reachable from this machine only and fetches nothing. What is given about merging is
    what it starts with; without a budget that is a quarter of the visual tokens, or what the
    checkpoint's own pitome_config.json says.

    Example: `pitome-vlm web --model demo`
    """
    given = merging.given()
    require("gradio", "web", "the page")
    from .session import load_model, one_thread, planned_config

    with quiet(verbose):
        config, _ = planned_config(model, given)
    vlm, processor = load_model(model, config=config, verbose=verbose, **vars(loading))
    with quiet(verbose), one_thread() if model == DEMO else contextlib.nullcontext():
        from ..web.page import serve
        from ..web.session import Limits, Session

        session = Session(vlm, processor, config, model, Limits(answer=max_new_tokens))
        serve(session, port, announced)


def announced(address: str) -> None:
    """Say where the page is: the address alone on stdout, for scripts."""
    write(address.rstrip("/"))
    say("Open this address in a browser; Ctrl-C stops the page.")
