"""The repository's own text uses one word per thing, and plain ones."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLACES = (
    *("pitome_vlm", "scripts", "tests", "docs", ".github"),
    *("eval/README.md", "Makefile", "pyproject.toml", "*.md", ".*.yaml"),
)
KINDS = {".py", ".md", ".yaml", ".yml", ".toml", ".sh", ""}

INSTEAD = {
    r"behind": "after (later in a sequence)",
    r"beside\b": "next to, with",
    r"in front of": "before",
    r"goes on with": "resumes, continues",
    r"picture": "image",
    r"\b(issue|design) \d": "what it says; users do not have that document",
    r"pip install [\"']pitome-vlm\[": "common.install_hint: the package is not on PyPI",
}
# File, and the text that may stay in it.
ALLOWED = (
    # The bundled model was trained on these words.
    ("pitome_vlm/demo/questions.py", "is there a {} in the picture"),
    ("pitome_vlm/demo/processor.py", "count a in picture "),
    # Names that are gone.
    ("CHANGELOG.md", "`demo.picture`"),
    ("CHANGELOG.md", "`--picture`"),
    ("CHANGELOG.md", "`vllm.pictures`"),
)


def files(place):
    """What is read in a place; this file names the words itself."""
    for found in ROOT.glob(place):
        inside = [found] if found.is_file() else found.rglob("*")
        for file in inside:
            if file.suffix in KINDS and "__pycache__" not in file.parts and file.is_file():
                yield file


def test_every_place_has_files():
    assert [place for place in PLACES if not any(files(place))] == []
    assert any(file.suffix == ".yml" for file in files(".github"))


def test_words_have_plain_alternatives():
    wrong = []
    for file in {file for place in PLACES for file in files(place)} - {Path(__file__).resolve()}:
        name = file.relative_to(ROOT).as_posix()
        text = file.read_text(encoding="utf-8")
        for allowed in (words for place, words in ALLOWED if place == name):
            text = text.replace(allowed, "")
        for number, line in enumerate(text.splitlines(), 1):
            wrong += [
                f"{name}:{number}: {found[0]!r}, better: {better}"
                for word, better in INSTEAD.items()
                for found in re.finditer(word, line, re.IGNORECASE)
            ]
    assert not wrong, "\n".join(wrong)
