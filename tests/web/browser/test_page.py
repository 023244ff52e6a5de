"""The page in a real browser: `make test-web`."""

from __future__ import annotations

import http.server
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading

import pytest
from gradio_client import Client, handle_file
from playwright.sync_api import sync_playwright

from pitome_vlm.demo import scene_image
from pitome_vlm.web.session import Limits

# Milliseconds for an answer of the bundled model, on a machine that does much else.
SOON = 120_000
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
    said = process.stderr.read().splitlines()
    assert said[-1] == "interrupted"
    assert "Traceback" not in "".join(said)


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
    page.set_input_files("#image input[type=file]", file)
    page.wait_for_selector("#image img[src*='/file=']")


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
    page.click("#image button[aria-label*='lear'], #image button[title*='lear']")
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


def test_twenty_requests_at_once_are_all_answered_and_too_many_refused(server, scene):
    client = Client(server, verbose=False, download_files=False)
    image = handle_file(scene)
    keeps = [0.25 + 0.01 * number for number in range(20)]
    jobs = [client.submit(image, QUESTION, keep, "tome", api_name="/compare") for keep in keeps]
    for keep, job in zip(keeps, jobs, strict=True):
        page, settings = job.result(SOON / 1000)
        assert f"keep={round(keep, 2)}" in settings.replace(str(keep), str(round(keep, 2)))
        assert page.count("six") >= 1
    many = Limits().waiting + 20
    jobs = [client.submit(image, QUESTION, 0.25, "tome", api_name="/compare") for _ in range(many)]
    refused = [str(job.exception(SOON / 1000)) for job in jobs if job.exception(SOON / 1000)]
    assert refused
    assert all("queue" in text.lower() for text in refused), refused
    assert len(refused) < many - 20


def test_addresses_and_other_files_are_not_read(server, tmp_path):
    visited = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            visited.append(self.path)

    class Fetched(http.server.HTTPServer):
        pass

    other = Fetched(("127.0.0.1", 0), Handler)
    threading.Thread(target=other.serve_forever, daemon=True).start()
    client = Client(server, verbose=False)
    secret = tmp_path / "secret.png"
    scene_image(0, "val").save(secret)
    for path in (f"http://127.0.0.1:{other.server_port}/cat.png", str(secret), "/etc/passwd"):
        image = {"path": path, "meta": {"_type": "gradio.FileData"}}
        with pytest.raises(Exception, match=r"not fetched|not allowed|error"):
            client.predict(image, QUESTION, 0.25, "tome", api_name="/compare")
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
