"""The repository's own text uses one word per thing, and plain ones."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLACES = ("pitome_vlm", "scripts", "docs", "eval/README.md", "Makefile", "pyproject.toml", "*.md")
KINDS = {".py", ".md", ".yaml", ".toml", ".sh", ""}

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
)


def files():
    for place in PLACES:
        for found in ROOT.glob(place):
            inside = [found] if found.is_file() else found.rglob("*")
            yield from (file for file in inside if file.is_file())


def test_words_have_plain_alternatives():
    wrong = []
    for file in files():
        name = file.relative_to(ROOT).as_posix()
        if file.suffix not in KINDS or "__pycache__" in name:
            continue
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
