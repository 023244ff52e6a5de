"""`pitome-vlm serve`: right answers, broken requests, a thousand of both."""

from __future__ import annotations

import io
import random
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest

pytest.importorskip("vllm.version", reason="make test-vllm builds an environment with vLLM")

import httpx
import torch
from PIL import Image
from served_models import environment
from transformers import AutoProcessor, LlavaForConditionalGeneration
from vllm.version import __version_tuple__

import pitome_vlm
from pitome_vlm.demo import checkpoint_path, load_split, scene_image
from pitome_vlm.measure.asking import question_prompt
from pitome_vlm.measure.demo_benchmark import Setting, ask, run
from pitome_vlm.vllm import served_config
from scripts.serving.memory import KERNELS, as_url, broken_urls, held

KEEP, MAX_KEEP = 0.25, 0.5
# Later releases ask the server's owner whether requests may have options for the processor.
TRUSTED = ["--trust-request-mm-kwargs"] if __version_tuple__ >= (0, 32) else []
ANSWER_TOKENS = 3
QUESTIONS = 60
# (width, height); the processor brings all of them to one size.
SIZES = [(640, 480), (97, 333), (1500, 200), (33, 33), (1024, 1024), (7, 300), (501, 499)]
START_SECONDS = 600
# oneDNN keeps a compiled kernel for every shape of a matrix product, 1024 of them if nobody says
# otherwise, and a server grows by them whatever it serves (eval/results/serving/memory.md). With
# few of them the server stays where it is after some thousand requests. What a thousand more may
# add is far below what they would leave: the merged tokens of their images alone are
# 18 MiB, the images 130 MiB.
FEW_KERNELS = {KERNELS: "16"}
WARM_UP = 3000
GROWTH = {"front end": 4 * 2**20, "workers": 6 * 2**20}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Address and process of a server with one image per prompt."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["-m", "pitome_vlm", "serve", "demo", "--keep", str(KEEP), "--host", "127.0.0.1"]
    words += ["--port", str(port), "--dtype", "float32", "--enforce-eager"]
    words += ["--max-model-len", "400", "--max-num-seqs", "16", "--served-model-name", "demo"]
    words += ["--limit-mm-per-prompt", '{"image": 1}', "--mm-processor-cache-gb", "0.05"]
    words += ["--max-keep", str(MAX_KEEP), *TRUSTED]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *words], env=environment(**FEW_KERNELS), stdout=file, stderr=file
        )
        address = f"http://127.0.0.1:{port}"
        try:
            wait_for(process, address, log)
            yield address, process
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=60)


def wait_for(process, address, log):
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            if httpx.get(f"{address}/health").status_code == 200:
                return
        except httpx.HTTPError:
            pass  # not up yet
        time.sleep(0.5)
    raise AssertionError(log.read_text()[-4000:])


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def body(urls, question):
    content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {
        "model": "demo",
        "messages": [{"role": "user", "content": [*content, {"type": "text", "text": question}]}],
        "temperature": 0,
        "max_tokens": ANSWER_TOKENS,
        "add_special_tokens": True,
    }


def with_budget(request, asked):
    return {**request, "mm_processor_kwargs": {"pitome": asked}}


@pytest.fixture(scope="module")
def library():
    """The model without a wrapper, its processor, and the config as it is served."""
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint_path(), dtype=torch.float32)
    config = served_config(pitome_vlm.MergeConfig(keep=KEEP))
    return model.eval(), AutoProcessor.from_pretrained(checkpoint_path()), config


@pytest.fixture(scope="module")
def questions(library):
    """(request, the library's answer) about scenes of the test split."""
    model, processor, config = library
    samples = load_split("test", QUESTIONS)
    (outcome,) = run(model, processor, [Setting("served", config)], samples, split="test")
    urls = {one.scene_id: as_url(png(scene_image(one.scene_id, "test"))) for one in samples}
    requests = [body([urls[one.scene_id]], one.question) for one in samples]
    return list(zip(requests, outcome.answers, strict=True))


@pytest.fixture(scope="module")
def mixed(library):
    """(request, the library's answer) about images of other sizes than the model's."""
    (model, processor, config), found = library, []
    with pitome_vlm.wrapped(model, config=config):
        for one, size in zip(load_split("test", len(SIZES)), SIZES, strict=True):
            image, text = scene_image(one.scene_id, "test").resize(size), one.question
            prompt = question_prompt(processor, text)
            batch = processor(images=[image], text=[prompt], return_tensors="pt")
            (answer,) = ask(model, processor, dict(batch))
            found.append((body([as_url(png(image))], text), answer))
    return found


@pytest.fixture(scope="module")
def broken(questions):
    """Requests that no server can answer, by what is wrong with them."""
    good = questions[0][0]["messages"][0]["content"][0]["image_url"]["url"]
    found = {
        name: body([url], "how many stars are there?") for name, url in broken_urls(good).items()
    }
    found["two images"] = body([good, good], "how many stars are there?")
    found["a long prompt"] = body([good], "star " * 500)
    for asked in ({"keep": 0.6}, {"keep": 0}, {"tokens": "all"}, {"algorithm": "tome"}, 0.5):
        found[f"budget {asked}"] = with_budget(body([good], "how many?"), asked)
    return found


def post(address, request):
    return httpx.post(f"{address}/v1/chat/completions", json=request, timeout=120)


def answer_of(response):
    return response.json()["choices"][0]["message"]["content"].strip()


def test_every_broken_request_is_the_client_s_fault(server, broken):
    found = {name: post(server[0], request) for name, request in broken.items()}
    assert {name: one.status_code // 100 for name, one in found.items()} == dict.fromkeys(found, 4)
    assert all(one.json()["error"]["message"] for one in found.values())
    assert "40000000" in found["oversized"].json()["error"]["message"]


def test_a_thousand_requests_some_broken(server, questions, mixed, broken):
    """The broken ones get a 4xx, the others the library's answers; memory does not grow."""
    address, process = server
    draw = random.Random(0)
    names = sorted(broken)
    jobs = [
        (broken[draw.choice(names)], None)
        if draw.random() < 0.2
        else draw.choice(mixed if draw.random() < 0.3 else questions)
        for _ in range(1000)
    ]
    with httpx.Client(timeout=120) as client, ThreadPoolExecutor(12) as pool:

        def send(job):
            return client.post(f"{address}/v1/chat/completions", json=job[0])

        for _ in range(WARM_UP // len(jobs)):
            list(pool.map(send, jobs))
        memory = [held(process.pid)]
        for _ in range(2):
            responses = list(pool.map(send, jobs))
            memory.append(held(process.pid))
    codes = [one.status_code for one in responses]
    asked = [number for number, (_, expected) in enumerate(jobs) if expected is not None]
    assert all(400 <= codes[n] < 500 for n in set(range(1000)) - set(asked))
    assert [codes[n] for n in asked] == [200] * len(asked)
    wrong = {
        (jobs[n][0]["messages"][0]["content"][1]["text"], jobs[n][1], answer_of(responses[n]))
        for n in asked
        if answer_of(responses[n]) != jobs[n][1]
    }
    # Answers that hang on the last bit may differ: 2 of 2400 do (eval/results/serving).
    assert len(wrong) <= 1, wrong
    # What is kept adds up every time; an allocator that takes some more for a thread does not.
    grown = {
        name: [later[name] - earlier[name] for earlier, later in pairwise(memory)]
        for name in GROWTH
    }
    assert all(min(grown[name]) < GROWTH[name] for name in GROWTH), grown
    assert httpx.get(f"{address}/health").status_code == 200


def test_tokens_are_counted_after_merging_by_the_budget_of_each_request(server, questions):
    request = questions[0][0]
    asked = request["messages"][0]["content"][1]["text"]
    alone = post(server[0], body([], asked)).json()["usage"]["prompt_tokens"]
    budgets = {None: 36, "keep 0.5": 72, "tokens 9": 9}
    for budget, expected in budgets.items():
        word, _, value = (budget or "").partition(" ")
        own = with_budget(request, {word: float(value)}) if word else request
        usage = post(server[0], own).json()["usage"]["prompt_tokens"]
        assert usage - alone == expected
    # Once more, now that the image is cached with other budgets.
    assert post(server[0], request).json()["usage"]["prompt_tokens"] - alone == 36
