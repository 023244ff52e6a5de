"""Requests to vLLM's own HTTP application around an engine that is there already.

A server of its own takes a model ten times as long to start. Only what stands between the
application and the engine is made here: one request after the other, whose errors are told apart
as `AsyncLLM` does.
"""

from __future__ import annotations

import asyncio
import base64
import importlib
from pathlib import Path

import httpx

from pitome_vlm.demo.processor import CHAT_TEMPLATE


class Client:
    """What the application asks of an engine."""

    is_running, is_stopped, errored, dead_error = True, False, False, None

    def __init__(self, llm):
        self.engine = llm.llm_engine
        self.vllm_config, self.model_config = self.engine.vllm_config, self.engine.model_config
        self.renderer, self.input_processor = self.engine.renderer, self.engine.input_processor

    def check_admission(self, *_, **__):
        """All are let in."""

    async def is_tracing_enabled(self):
        return False

    async def generate(self, prompt, sampling_params, request_id, **_):
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        try:
            self.engine.add_request(request_id, prompt, sampling_params)
        except VLLMClientError:
            raise
        except Exception as error:
            # It may have got half of the way.
            self.engine.abort_request(list(self.engine.output_processor.request_states), True)
            raise EngineGenerateError() from error
        finished = False
        while not finished:
            try:
                outputs = self.engine.step()
            except Exception as error:
                # A process of its own would have ended.
                self.errored, self.dead_error = True, EngineDeadError()
                raise self.dead_error from error
            for output in outputs:
                finished = output.finished
                yield output


async def application(llm, template: str):
    """Of a server whose clients may set options of processors."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    server = importlib.import_module("vllm.entrypoints.openai.api_server")
    try:
        options = importlib.import_module("vllm.entrypoints.launchers.cli_args")
    except ModuleNotFoundError:
        # vLLM 0.27, which asks nobody whether clients may.
        options, trusted = importlib.import_module("vllm.entrypoints.openai.cli_args"), []
    else:
        trusted = ["--trust-request-mm-kwargs"]
    words = ["--model", "x", "--served-model-name", "tiny", "--chat-template", template, *trusted]
    args = options.make_arg_parser(FlexibleArgumentParser()).parse_args(words)
    client, tasks = Client(llm), ("generate",)
    app = server.build_app(args, tasks, client.model_config)
    await server.init_app_state(client, app.state, args, tasks)
    return app


def responses(llm, requests: list[dict], mark: str) -> list[tuple[int, str]]:
    """Status of the answer to each of some requests, see `body`, and what an error says."""

    async def ask():
        app = await application(llm, chat_template(mark))
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://tiny") as client:
            found = []
            for request in requests:
                sent = await client.post("/v1/chat/completions", json=body(request), timeout=600)
                error = sent.json().get("error") or {}
                found.append((sent.status_code, error.get("message", "")))
            return found

    return asyncio.run(ask())


def body(request: dict) -> dict:
    """A request of these tests as a client sends it."""
    content = [part("image", image_url(path)) for path in request.get("images", ())]
    content += [part("image", address) for address in request.get("urls", ())]
    content += [part("video", address) for address in request.get("videos", ())]
    content.append({"type": "text", "text": request["prompt"]})
    options = dict(request.get("processor", {}))
    if "pitome" in request:
        options["pitome"] = request["pitome"]
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": 2,
        **({"mm_processor_kwargs": options} if options else {}),
        **request.get("own", {}),
    }


def part(kind: str, address: str) -> dict:
    return {"type": f"{kind}_url", f"{kind}_url": {"url": address}}


def image_url(path: str) -> str:
    return "data:image/png;base64," + base64.b64encode(Path(path).read_bytes()).decode()


def chat_template(mark: str) -> str:
    """The demo's.

    Args:
        mark: what stands for an image.
    """
    return CHAT_TEMPLATE.replace("<image>", mark)
