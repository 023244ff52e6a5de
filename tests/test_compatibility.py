"""docs/compatibility.md names tests that exist, and leaves out no mode that is tested."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).resolve().parent
PAGE, LIST = (
    (TESTS.parent / "docs" / name).read_text()
    for name in ("compatibility.md", "compatibility-tests.md")
)
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (PAGE + LIST).splitlines()
    if line.startswith("| ") and not line.startswith(("| what |", "| key |"))
]
KEYS = {row[0]: row[1].strip("`") for row in ROWS if len(row) == 2}
ENTRIES = [row for row in ROWS if len(row) == 3]
# Every test of these files is in the page.
WHOLE = ("test_modes.py", "test_assistants.py", "test_libraries.py")


def named_in(file):
    nodes = ast.walk(ast.parse((TESTS / file).read_text()))
    return {n.name for n in nodes if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")}


def test_every_named_test_exists_and_is_referred_to():
    assert len(KEYS) > 40
    for name in KEYS.values():
        file, test = name.split("::")
        assert test in named_in(file), name
    used = [key for _, _, keys in ENTRIES for key in keys.split()]
    assert set(used) == KEYS.keys()


def test_every_row_says_what_is_known():
    for what, known, keys in ENTRIES:
        assert known in ("works", "as unwrapped", "refused", "not tested"), what
        assert bool(keys) == (known != "not tested"), what


def test_no_mode_is_left_out():
    listed = set(KEYS.values())
    for file in WHOLE:
        path = f"wrapping/{file}"
        missing = {f"{path}::{test}" for test in named_in(path)} - listed
        assert not missing
    tree = ast.parse((TESTS / "wrapping/test_modes.py").read_text())
    modes = next(
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "MODES"
    )
    options = {
        key.value
        for group in modes.values
        for node in ast.walk(group)
        if isinstance(node, ast.Dict)
        for key in node.keys
        if isinstance(key, ast.Constant)
    }
    assert len(options) > 30
    named = set(re.findall(r"`(\w+)", PAGE))
    assert not options - named
