"""`pitome-vlm web` without Gradio; with it: `make test-web`."""

from __future__ import annotations

from absent import hide
from cli_runner import fails_in_one_line, run


def test_without_gradio_one_line_says_what_to_install(monkeypatch):
    hide(monkeypatch, "gradio")
    fails_in_one_line(run("web"), 'the page needs gradio; install it with: pip install ".[web]"')


def test_wrong_options_are_refused_before_anything_is_loaded():
    fails_in_one_line(run("web", "--port", 70000), "--port")
    fails_in_one_line(run("web", "--keep", 2), "keep must be in")
    fails_in_one_line(run("web", "--share"), "No such option: --share")
