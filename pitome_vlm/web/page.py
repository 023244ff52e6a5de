"""The page itself, in Gradio; the only module that knows it."""

from __future__ import annotations

import socket
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from ..common import whole_number
from ..measure.visualize import GROUP_STYLE
from .examples import write_examples
from .render import compared_html, methods_html, problem_html
from .session import LOWEST_KEEP, Session, command_line, wrap_line

HOST = "127.0.0.1"
TITLE = "pitome_vlm: fewer visual tokens, same question"
# Files that visitors uploaded: how often to look for old ones, and when they are old, in seconds.
_TIDY = (3600, 24 * 3600)


def serve(session: Session, port: int, announce: Callable[[str], None]) -> None:
    """Show the page on this machine until Ctrl-C.

    Args:
        session: the model.
        port: of 127.0.0.1; 0 for a free one.
        announce: called with the address once the page is there.

    Raises:
        OSError: the port is taken.
    """
    whole_number("port", port, 0, 65535)
    port = _free(port)
    with tempfile.TemporaryDirectory(prefix="pitome-vlm-web-") as folder:
        page = build(session, write_examples(Path(folder)))
        _, address, _ = page.launch(
            server_name=HOST,
            server_port=port,
            share=False,
            max_file_size=session.limits.image.max_bytes,
            prevent_thread_lock=True,
            quiet=True,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            mcp_server=False,
            ssr_mode=False,
            # Fonts of the machine: Gradio's own come from the network.
            theme=gr.themes.Default(font="system-ui", font_mono="ui-monospace"),
            css=GROUP_STYLE + Path(__file__).with_name("page.css").read_text(encoding="utf-8"),
        )
        announce(address)
        try:
            threading.Event().wait()
        finally:
            page.close(verbose=False)


def _free(port: int) -> int:
    """The port, or any for 0; Gradio says in three lines that one is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            raise OSError(
                f"port {port} of {HOST} is taken or not allowed; give another with --port"
            ) from None
        found: int = probe.getsockname()[1]
        return found


def build(session: Session, examples: list[tuple[str, str]]) -> Any:
    """The page; it opens with the first of the examples answered."""
    limits, (first, question) = session.limits, examples[0]
    start = session.algorithms[0]
    shown, settings = _compared(session, first, question, session.keep, start)
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=_TIDY) as page:
        gr.Markdown(f"## {TITLE}")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                image = gr.Image(
                    first, label="Image", type="filepath", image_mode=None, height=300,
                    sources=["upload", "clipboard"], buttons=[], elem_id="image",
                )  # fmt: skip
                samples = gr.Row()
                asked = gr.Textbox(
                    question, label=f"Question to the model {session.name}", lines=1,
                    max_length=limits.question, elem_id="question",
                )  # fmt: skip
                keep = gr.Slider(
                    LOWEST_KEEP, 1.0, session.keep, step=0.01, elem_id="keep",
                    label="Visual tokens kept, as a fraction",
                )  # fmt: skip
                algorithm = gr.Dropdown(
                    session.algorithms, value=start, label="Algorithm", elem_id="algorithm"
                )
                ask = gr.Button("Ask with and without merging", variant="primary", elem_id="ask")
            with gr.Column(scale=3, min_width=300):
                result = gr.HTML(shown, elem_id="result")
                lines = gr.Code(
                    settings, label="These settings in Python and in a terminal", language="python",
                    interactive=False, wrap_lines=True, lines=2, elem_id="settings",
                )  # fmt: skip
        with samples:
            gr.Examples(
                [list(example) for example in examples], [image, asked], label="Scenes of the demo",
                visible_columns=[0], examples_per_page=len(examples), elem_id="examples",
            )  # fmt: skip
        every = gr.Button("Ask with all methods", elem_id="every")
        strip = gr.HTML(elem_id="strip")
        _only_uploads(image)
        shared: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}
        gr.on(
            [ask.click, asked.submit, keep.release, algorithm.input],
            lambda *given: _compared(session, *given),
            [image, asked, keep, algorithm],
            [result, lines],
            api_name="compare",
            api_visibility="undocumented",
            trigger_mode="always_last",
            **shared,
        )
        every.click(
            lambda *given: _every(session, *given),
            [image, asked, keep],
            strip,
            api_name="methods",
            api_visibility="undocumented",
            **shared,
        )
    page.queue(max_size=limits.waiting)
    return page


def _compared(
    session: Session, image: str | None, question: str, keep: float, algorithm: str
) -> tuple[str, str]:
    """The answers as HTML, and the settings as text; an error in the place of both."""
    try:
        replies = session.compare(image, question, keep, algorithm)
        config = replies[-1].config
        return compared_html(replies), "\n".join(
            [wrap_line(config), f"# {command_line(config, session.name, question)}"]
        )
    except Exception as error:
        return problem_html(_one_line(error, image)), ""


def _every(session: Session, image: str | None, question: str, keep: float) -> str:
    try:
        return methods_html(*session.methods(image, question, keep))
    except Exception as error:
        return problem_html(_one_line(error, image))


def _one_line(error: Exception, image: str | None) -> str:
    """A message for the page, in which an upload has its name and not its place on this machine."""
    text = " ".join(str(error).split()) or type(error).__name__
    if not isinstance(error, (ValueError, TypeError, OSError)):
        text = f"{type(error).__name__}: {text}"
    return text.replace(image, Path(image).name) if image else text


def _only_uploads(image: Any) -> None:
    """Let this component take files that were uploaded and nothing else.

    Gradio would also fetch an address, decode data of any size from a request, and open the file
    before the limits are looked at.
    """
    move = image.async_move_resource_to_block_cache

    async def moved(path: Any) -> Any:
        if path is not None and "://" in str(path):
            raise gr.Error("upload the image: addresses are not fetched", print_exception=False)
        return await move(path)

    image.async_move_resource_to_block_cache = moved
    image.preprocess = lambda payload: payload and payload.path
