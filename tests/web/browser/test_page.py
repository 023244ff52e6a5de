"""The page in a real browser: `make test-web`."""

from __future__ import annotations

import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from playwright.sync_api import sync_playwright

from pitome_vlm.demo import scene_image
from pitome_vlm.web.session import Limits

# Milliseconds for an answer of the bundled model, on a machine that does much else.
SOON = 280_000
QUESTION = "Which number is the orange number?"


@pytest.fixture(scope="module")
def server():
    words = [sys.executable, "-m", "pitome_vlm", "web", "--port", "0", "--max-new-tokens", "4"]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    )
    address = process.stdout.readline().strip()
    assert address.startswith("http://127.0.0.1:"), process.stderr.read()
    yield address
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    # Gradio logs the requests for foreign files, which it refuses by itself, as tracebacks.
    assert process.stderr.read().splitlines()[-1] == "interrupted"


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(
            # Debian's browser where there is one; otherwise the one that Playwright installed.
            executable_path=shutil.which("chromium"),
            args=["--no-sandbox"],
        )
        yield found
        found.close()


@pytest.fixture
def page(browser, server):
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    yield opened(context, server)
    context.close()


def opened(context, server):
    page = context.new_page()
    page.set_default_timeout(SOON)
    page.requested = []
    page.on("request", lambda request: page.requested.append(request.url))
    page.goto(server)
    page.wait_for_selector("#result .pv-answers")
    return page


def upload(page, file):
    with page.expect_response(lambda response: "/upload" in response.url):
        page.set_input_files("#image input[type=file]", file)
    # A broken image has no size, so it is there without being visible.
    name = os.path.basename(file)
    page.wait_for_selector(f"#image img[src*='{name}']", state="attached")


def ask(page):
    with page.expect_response(lambda r: "/queue/join" in r.url):
        page.click("button#ask, #ask button")


@pytest.fixture
def scene(tmp_path):
    file = tmp_path / "scene.png"
    scene_image(2, "val").save(file)
    return str(file)


def test_it_opens_answered_and_talks_to_nobody_else(page, server):
    assert page.locator("#result .pv-answers section").count() == 2
    assert "36 of 144" in page.inner_text("#result")
    assert page.locator("#result svg .group").count() == 36
    assert "pitome_vlm.wrap(model, keep=0.25)" in page.inner_text("#settings")
    own = (server, "data:", "blob:")
    assert [url for url in page.requested if not url.startswith(own)] == []
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.2", int(server.rpartition(":")[2]))) != 0


def test_upload_slide_and_read(page, scene):
    upload(page, scene)
    page.fill("#question textarea, #question input", QUESTION)
    slider = page.locator("#keep input[type=range]")
    slider.focus()
    # The answer to letting go of the slider comes by itself.
    slider.press("End")
    slider.dispatch_event("pointerup")
    page.wait_for_function("document.querySelector('#result').innerText.includes('144 of 144')")
    answers = page.locator("#result p.pv-answer").all_inner_texts()
    assert answers == ["six", "six"]
    assert QUESTION in page.inner_text("#settings")
    page.click("#every button, button#every")
    page.wait_for_selector("#strip .pv-strip")
    assert page.locator("#strip figure").count() == 11


def test_a_broken_upload_is_one_line_and_the_next_one_works(page, scene, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    upload(page, str(broken))
    ask(page)
    page.wait_for_selector("#result .pv-problem")
    said = page.inner_text("#result .pv-problem")
    assert said.startswith("broken.png")
    assert "\n" not in said.strip()
    upload(page, scene)
    ask(page)
    page.wait_for_selector("#result .pv-answers")


def test_text_is_never_run(page):
    page.fill("#question textarea, #question input", "${1+1} {{7*7}} <img src=x onerror='pv=1'>")
    ask(page)
    page.wait_for_function("document.querySelector('#settings').innerText.includes('7*7')")
    assert page.evaluate("window.pv === undefined")
    assert "${1+1}" in page.inner_text("#settings")


def test_a_second_tab_has_settings_of_its_own(browser, server):
    context = browser.new_context()
    first, second = opened(context, server), opened(context, server)
    second.fill("#keep input[type=number]", "0.5")
    ask(second)
    second.wait_for_function("document.querySelector('#result').innerText.includes('72 of 144')")
    assert "36 of 144" in first.inner_text("#result")
    ask(first)
    first.wait_for_function("document.querySelector('#settings').innerText.includes('0.25')")
    assert "36 of 144" in first.inner_text("#result")
    context.close()


def request(server, name, image, *rest):
    """The outcome of one request as the page makes it: "complete" or an error, and its data."""
    given = {"path": image, "meta": {"_type": "gradio.FileData"}}
    address = f"{server}/gradio_api/call/{name}"
    asked = httpx.post(address, json={"data": [given, *rest]}, timeout=2 * SOON / 1000)
    if asked.status_code != 200:
        return "refused", asked.text
    answer = httpx.get(f"{address}/{asked.json()['event_id']}", timeout=2 * SOON / 1000).text
    kind, data = re.findall(r"event: (complete|error)\ndata: (.*)", answer)[-1]
    return kind, json.loads(data)


def uploaded(server, file):
    with open(file, "rb") as content:
        sent = httpx.post(f"{server}/gradio_api/upload", files={"files": content}, timeout=60)
    return sent.json()[0]


def test_twenty_requests_at_once_are_all_answered_and_too_many_refused(server, scene):
    image = uploaded(server, scene)
    keeps = [round(0.25 + 0.01 * number, 2) for number in range(20)]
    with ThreadPoolExecutor(64) as visitors:
        found = list(
            visitors.map(
                lambda keep: request(server, "compare", image, QUESTION, keep, "tome"), keeps
            )
        )
        for keep, (kind, data) in zip(keeps, found, strict=True):
            assert kind == "complete", data
            assert f"{round(144 * keep)} of 144" in data[0]
            assert f"keep={keep}, algorithm='tome'" in data[1]
        many = range(Limits().waiting + 20)
        found = list(
            visitors.map(lambda _: request(server, "compare", image, QUESTION, 0.25, "tome"), many)
        )
    refused = [str(data) for kind, data in found if kind != "complete"]
    assert 0 < len(refused) <= 20
    assert all("full" in text.lower() for text in refused), refused


def test_addresses_and_other_files_are_not_read(server, tmp_path):
    visited = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            visited.append(self.path)

    other = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=other.serve_forever, daemon=True).start()
    secret = tmp_path / "secret.png"
    scene_image(0, "val").save(secret)
    for path in (f"http://127.0.0.1:{other.server_port}/cat.png", str(secret), "/etc/passwd"):
        kind, data = request(server, "compare", path, QUESTION, 0.25, "tome")
        assert kind == "error", data
    other.shutdown()
    assert visited == []


@pytest.mark.parametrize("width", [1280, 400])
def test_it_fits_the_screen(browser, server, width):
    context = browser.new_context(viewport={"width": width, "height": 900})
    page = opened(context, server)
    page.click("#every button, button#every")
    page.wait_for_selector("#strip .pv-strip")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=f"{folder}/web-{width}.png", full_page=True)
    context.close()
