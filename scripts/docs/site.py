"""Build the documentation site: `make docs`, or `python -m scripts.docs.site`.

Pages link to each other as files of the repository do, so that they can be read there. For the
site, docs/ becomes the root and everything else keeps its place under it: links are rewritten, and
those to files that are no pages (sources, folders) become plain text. A link to what does not exist
is an error. Then zensical builds build/site, strictly.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from posixpath import normpath, relpath

ROOT = Path(__file__).resolve().parents[2]
STAGED = ROOT / "build/docs"
PAGES = (
    "docs/*.md",
    "*.md",
    "eval/README.md",
    "eval/published/README.md",
    "eval/results/**/*.md",
    "scripts/README.md",
    "pitome_vlm/demo/checkpoint/README.md",
)
FILES = ("docs/assets/*", "docs/*.ipynb", "eval/results/**/*.png", "LICENSE", "CITATION.cff")
HOME = {"README.md": "index.md", "docs/README.md": "index.md"}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
CODE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def staged() -> dict[str, str]:
    """Paths in the repository of all pages and files, and where they are on the site."""
    found = {}
    for pattern in (*PAGES, *FILES):
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            found[name] = HOME.get(name, name.removeprefix("docs/"))
    return found


def rewritten(text: str, page: str, places: dict[str, str]) -> str:
    """A page with the links of the site.

    Args:
        text: Markdown.
        page: its path in the repository.
        places: `staged`.

    Raises:
        ValueError: a link leads to nothing.
    """

    def change(found: re.Match[str]) -> str:
        bang, words, link = found.groups()
        target, _, anchor = link.partition("#")
        if not target or "://" in target or target.startswith("mailto:"):
            return found[0]
        name = normpath(f"{page.rpartition('/')[0] or '.'}/{target}")
        if not (ROOT / name).exists():
            raise ValueError(f"{page}: {link} leads to nothing")
        place = places.get(name) or places.get(f"{name}/README.md")
        if place is None:
            return words
        here = places[page].rpartition("/")[0] or "."
        return f"{bang}[{words}]({relpath(place, here)}{'#' * bool(anchor)}{anchor})"

    return "".join(part if code else LINK.sub(change, part) for code, part in _parts(text))


def _parts(text: str) -> Iterator[tuple[bool, str]]:
    """Blocks of code and what stands between them."""
    start = 0
    for block in CODE.finditer(text):
        yield False, text[start : block.start()]
        yield True, block[0]
        start = block.end()
    yield False, text[start:]


def stage(folder: Path) -> None:
    """Write pages and files of the site into an empty `folder`."""
    places = staged()
    for name, place in places.items():
        target = folder / place
        target.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".md"):
            if name != "README.md":  # the home page is docs/README.md
                target.write_text(rewritten((ROOT / name).read_text(), name, places))
        else:
            shutil.copyfile(ROOT / name, target)


def main() -> None:
    """Stage and build; exits with what the builder returns."""
    shutil.rmtree(STAGED, ignore_errors=True)
    stage(STAGED)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    sys.exit(subprocess.run(command, cwd=ROOT, env=env).returncode)


if __name__ == "__main__":
    main()
