"""The documentation site: all links lead somewhere, and every page is in its menu."""

import re

import pytest
import yaml

from scripts.docs.site import ROOT, rewritten, stage, staged


def menu(entries):
    for entry in entries:
        for target in entry.values() if isinstance(entry, dict) else [entry]:
            yield from menu(target) if isinstance(target, list) else [target]


def test_pages_link_to_pages_and_all_of_them_are_in_the_menu(tmp_path):
    stage(tmp_path)
    named = set(menu(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert [name for name in named if not (tmp_path / name).is_file()] == []
    pages = {path.name for path in tmp_path.glob("*.md")} - {"SECURITY.md"}
    assert pages <= named
    for page in tmp_path.rglob("*.md"):
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text):
            assert (page.parent / link).is_file(), f"{page.name}: {link}"


def test_links_keep_their_words_and_anchors():
    places = staged()
    text = "[a](../eval/README.md#x) ![b](assets/scene.png) [c](../scripts/demo/scene.py) [d](#e)"
    text += "\n\n```\n[a](nothing.md)\n```\n"
    changed = rewritten(text, "docs/choosing.md", places)
    assert changed.startswith("[a](eval/README.md#x) ![b](assets/scene.png) c [d](#e)")
    assert "[a](nothing.md)" in changed
    with pytest.raises(ValueError, match=r"docs/choosing.md: nothing.md leads to nothing"):
        rewritten("[a](nothing.md)", "docs/choosing.md", places)
