"""What commands look like on a terminal of 80 columns with colours on."""

from __future__ import annotations

import io
import re
import shutil

import pytest
from pseudo_terminal import on_terminal
from rich.console import Console
from rich.text import Text

from pitome_vlm.cli import terminal
from pitome_vlm.cli.terminal import show_table, write

COLUMNS = 80
HELP = ("", "demo", "ask", "chat", "info", "bench", "visualize", "eval", "tune", "verify", "train")
HELP += ("serve", "serve-args")
MARKUP = re.compile(r"\[/?(bold|italic|dim|red|green|\d+m)\b[^\]]*\]|\[\d*m")


def looks_right(shown) -> None:
    assert "\x1b" not in shown.text, "half a control sequence"
    assert not MARKUP.search(shown.text)
    assert "…" not in re.sub(r" …", "", shown.text), "a cell was cut off"
    assert max(map(len, shown.lines)) <= COLUMNS
    assert "Traceback" not in shown.text


@pytest.mark.parametrize("command", HELP)
def test_help(command):
    words = [command, "--help"] if command else ["--help"]
    shown, wide = (on_terminal(*words, columns=columns) for columns in (COLUMNS, 300))
    assert shown.code == 0
    assert "\x1b[" in shown.raw, "no colours"
    looks_right(shown)
    broken = {word for word in shown.words - wide.words if "," not in word}
    assert not broken, "words broken in two"


QUICK = ("--repeats", 1, "--warmup", 0, "--answer-tokens", 2, "--text-tokens", 8)
CASES = {
    "ask": ["-m", "demo", "-i", "IMAGE", "what is it?"],
    "info": ["--model", "demo"],
    "visualize": ["-m", "demo", "-i", "IMAGE", "-o", "here"],
    "serve-args": ["demo", "--keep", 0.5],
    "bench": ["--config", "tiny", "--keep", 0.5, "--batch", "1,2", *QUICK],
    "verify": ["--seeds", 1, "--sigma", "0.1", "--sizes", "8/4/2", "--count", 1, "--no-plot"],
}


@pytest.mark.parametrize("command", CASES)
def test_commands(command, image, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(image, "image.png")
    words = [word if word != "IMAGE" else "image.png" for word in CASES[command]]
    shown = on_terminal(command, *words)
    assert shown.code == 0, shown.text
    if command == "serve-args":  # one line that is meant to be copied
        shown.raw = re.sub(r"--hf-overrides .*", "", shown.raw)
    looks_right(shown)
    if command in ("ask", "visualize"):
        assert "Loading the bundled model ..." in shown.text


def test_an_error(image):
    shown = on_terminal("ask", "-m", "demo", "-i", image, "--keep", 0.5, "--algorithm", "tom", "q")
    assert shown.code == 2
    looks_right(shown)
    assert "error: unknown algorithm 'tom'. Did you mean 'tome'?" in " ".join(shown.text.split())


class TestTables:
    @pytest.fixture
    def console(self, monkeypatch):
        console = Console(file=io.StringIO(), width=40, force_terminal=True, color_system=None)
        monkeypatch.setattr(terminal, "out", console)
        return console

    def test_columns_that_do_not_fit_follow_in_a_second_table(self, console):
        heads = ["name", *(f"column {i}" for i in range(6))]
        show_table("Title", heads, [["row one", *map(str, range(6))]])
        lines = console.file.getvalue().splitlines()
        assert max(map(len, lines)) <= 40
        assert sum(line.startswith("row one") for line in lines) == 2
        assert [re.findall(r"column \d", line) for line in lines if "column" in line] == [
            ["column 0", "column 1", "column 2"],
            ["column 3", "column 4", "column 5"],
        ]

    def test_a_column_may_be_folded_between_words(self, console):
        question = "which shape is the white object?"
        show_table("T", ["question", "a" * 20], [[question, "b"]], folds=(0, 10))
        text = console.file.getvalue()
        assert set(question.split()) <= set(text.split())
        assert max(map(len, text.splitlines())) <= 40

    def test_markup_is_text_and_styles_are_styles(self, console):
        show_table("T", ["[bold]"], [["[red]x[/]"], [Text("y", "green")]])
        assert "[bold]" in console.file.getvalue()
        assert "[red]x[/]" in console.file.getvalue()

    def test_without_a_terminal_tables_and_lines_are_as_wide_as_they_are(self, monkeypatch):
        console = Console(file=io.StringIO())
        monkeypatch.setattr(terminal, "out", console)
        show_table("T", ["a" * 90, "b" * 90], [["1", "2"]])
        write("word " * 100)
        lines = console.file.getvalue().splitlines()
        assert any("a" * 90 + "  " + "b" * 90 in line for line in lines)
        assert lines[-1] == "word " * 100

    def test_lines_are_folded_between_words_and_keep_their_indent(self, console):
        write("- " + "word " * 12)
        lines = console.file.getvalue().splitlines()
        assert len(lines) == 2
        assert lines[1].startswith("  word")
        write("word " * 12, fold=False)
        assert len(console.file.getvalue().splitlines()) == 3
