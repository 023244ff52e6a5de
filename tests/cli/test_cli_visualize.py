"""`pitome-vlm visualize`: one file per image in a folder."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
from cli_runner import fails_in_one_line, run
from PIL import Image


def test_visualize_writes_the_image_into_a_folder(checkpoint, image, tmp_path):
    folder = tmp_path / "new"
    words = ["--model", checkpoint, "--image", image, "--output", folder, "--size", 240]
    result = run("visualize", *words)
    assert result.exit_code == 0, result.stderr
    target = folder / "scene one-merged.png"
    assert result.stdout == f"{target}\n"
    assert "keep=0.25 (default)" in result.stderr
    # 90 x 60 pixels in 12 x 12 patches are 240 x 156; strips have one height, and a caption.
    assert Image.open(target).width == 16 + 369 + 16
    assert Image.open(target).height > 240 + 16


def test_visualize_compares_at_equal_tokens(checkpoint, image, tmp_path):
    words = ["visualize", "--model", checkpoint, "--image", image, "-o", tmp_path, "--size", 120]
    result = run(*words, "--ratio", 0.8, "--compare", "-v")
    assert result.exit_code == 0, result.stderr
    target = tmp_path / "scene one-compared.png"
    assert Image.open(target).width > 5 * 120
    fails_in_one_line(run(*words, "--compare"), "already holds scene one-compared.png")
    assert run(*words, "--algorithms", "tome", "--overwrite").exit_code == 0
    assert 2 * 120 < Image.open(target).width < 4 * 120


def test_svg_and_pdf_show_the_same_and_svg_knows_the_groups(checkpoint, image, tmp_path):
    words = ["visualize", "--model", checkpoint, "--image", image, "-o", tmp_path, "--size", 120]
    words += ["--algorithms", "tome,pool", "--algorithm", "random", "--keep", 0.25]
    for name in ("svg", "pdf"):
        result = run(*words, "--format", name, *(["--overwrite"] if name == "pdf" else []))
        assert result.exit_code == 0, result.stderr
        assert result.stdout == f"{tmp_path / f'scene one-compared.{name}'}\n"
    svg = ElementTree.parse(tmp_path / "scene one-compared.svg").getroot()
    kind = "{http://www.w3.org/2000/svg}"
    captions = [text.text for text in svg.iter(f"{kind}text")]
    assert captions == ["image", *(f"{name}, 36 tokens" for name in ("random", "tome", "pool"))]
    titles = [title.text for title in svg.iter(f"{kind}title")]
    assert sum(title.endswith("one token") for title in titles) == 3 * 36
    assert (tmp_path / "scene one-compared.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--image", "TEXT"], "not an image"),
        (["--image", "IMAGE", "--output", "IMAGE"], "output must be a folder, but"),
        (["--image", "IMAGE", "--image", "IMAGE"], "two images would both be written to"),
        (["--image", "IMAGE", "--algorithms", "tome,,pool"], "separated by single commas"),
        (["--image", "IMAGE", "--algorithms", "tom"], "Did you mean 'tome'?"),
        (["--image", "IMAGE", "--format", "jpeg"], "format must be one of png, svg, pdf"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(words, message, files, checkpoint):
    for name, path in files.items():
        words = [word.replace(name, path) for word in words]
    fails_in_one_line(run("visualize", "--model", checkpoint, *words), message)
