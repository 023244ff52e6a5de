"""One image, whatever form it comes in: the same pixels for every reader, or the same refusal."""

from __future__ import annotations

import io
import json
from functools import partial

import numpy as np
import pytest
from PIL import Image

from pitome_vlm.lmms.requests import opened
from pitome_vlm.loading.images import ImageError, ImageLimits, load_image
from pitome_vlm.measure.tune import Row, read_rows
from pitome_vlm.training import DataError, from_dataset, from_records, open_conversations

CHAT = [{"role": "user", "content": "what is it ?"}, {"role": "assistant", "content": "circle"}]


def ramp(kind, top):
    return Image.fromarray((np.linspace(0, 1, 32).reshape(4, 8) * top).astype(kind))


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    return {"exif": exif}


def colours(mode="RGBA"):
    values = np.zeros((4, 8, 4), np.uint8)
    values[..., 0], values[..., 1] = 200, np.arange(8) * 30
    values[..., 3] = np.linspace(0, 255, 32).reshape(4, 8)
    image = Image.fromarray(values)
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


# Name: image, format, options of `save`, and one pixel that is known: its place and value.
STORED = {
    "alpha": (colours(), "PNG", {}, ((0, 0), (255, 255, 255))),
    "alpha, webp": (colours(), "WEBP", {"lossless": True}, ((7, 3), (200, 210, 0))),
    "alpha, tiff": (colours(), "TIFF", {}, ((0, 0), (255, 255, 255))),
    "grey and alpha": (colours().convert("LA"), "PNG", {}, ((0, 0), (255,) * 3)),
    "palette": (colours("RGB").quantize(8), "GIF", {}, None),
    "palette, one clear": (colours("RGB").quantize(8), "PNG", {"transparency": 3}, None),
    "palette, all with alpha": (colours().quantize(8), "PNG", {}, ((0, 0), (253, 248, 247))),
    "grey, one clear": (ramp(np.uint8, 255), "PNG", {"transparency": 0}, ((0, 0), (255,) * 3)),
    "one colour clear": (
        Image.new("RGB", (8, 4), (9, 8, 7)),
        "PNG",
        {"transparency": (9, 8, 7)},
        ((3, 3), (255,) * 3),
    ),
    "black and white": (colours("1"), "PNG", {}, None),
    "16 bits": (ramp(np.uint16, 65535), "PNG", {}, ((1, 0), (8,) * 3)),
    "16 bits, one clear": (
        ramp(np.uint16, 65535),
        "PNG",
        {"transparency": 0},
        ((0, 0), (255,) * 3),
    ),
    "16 bits, turned": (ramp(np.uint16, 65535), "PNG", turned(), ((3, 7), (57,) * 3)),
    "16 bits, mapped and turned": (ramp(np.uint16, 65535), "TIFF", turned(), ((3, 7), (57,) * 3)),
    "16 bits, other end first": (ramp(">u2", 65535), "TIFF", {}, ((7, 3), (255,) * 3)),
    "16 bits in 32": (ramp(np.int32, 65535), "TIFF", {}, ((1, 0), (8,) * 3)),
    "floats": (ramp(np.float32, 1), "TIFF", {}, ((7, 3), (255,) * 3)),
    "floats, turned": (ramp(np.float32, 1), "TIFF", turned(), ((0, 0), (197,) * 3)),
    "cmyk": (colours("CMYK"), "JPEG", {}, None),
    "cmyk, turned": (colours("CMYK"), "TIFF", turned(), ((0, 0), (200, 0, 0))),
    "ycbcr": (colours("YCbCr"), "TIFF", {}, None),
    "turned": (colours("RGB"), "JPEG", turned(), None),
    "turned, alpha": (colours(), "WEBP", {"lossless": True} | turned(), ((3, 0), (255,) * 3)),
    "turned palette": (colours("RGB").quantize(8), "PNG", turned(), None),
    "two frames": (
        Image.new("RGB", (8, 4), "red"),
        "MPO",
        {"save_all": True, "append_images": [Image.new("RGB", (8, 4))]} | turned(),
        ((0, 0), (254, 0, 0)),
    ),
}
REFUSED = {
    "8 bits in 32": (ramp(np.int32, 255), "TIFF", {}, "these are 0 to 255; convert"),
    "32 bits": (ramp(np.int32, 70_000), "TIFF", {}, "these are 0 to 70000; convert"),
    "negative": (ramp(np.int32, -300), "TIFF", {}, "these are -300 to 0; convert"),
    "floats to 255": (ramp(np.float32, 255), "TIFF", {}, "must be in 0..1, got 0 to 255"),
    "no number": (ramp(np.float32, np.nan), "TIFF", {}, "must be in 0..1, got nan to nan"),
}


def forms(file):
    """Ways to hand over a file to each reader, as functions of no argument."""
    content = file.read_bytes()
    lazily, record = Image.open(io.BytesIO(content)), {"messages": CHAT}
    stored = {"bytes": content, "path": None}
    by_path = {"bytes": None, "path": file.name}
    (file.parent / "t.jsonl").write_text(json.dumps(record | {"image": by_path}))
    (file.parent / "q.jsonl").write_text(json.dumps({"image": by_path, "question": "q"}))
    yield "bytes", lambda: load_image(content)
    yield "bytearray", lambda: load_image(bytearray(content))
    yield "open file", lambda: load_image(io.BytesIO(content))
    yield "Pillow", lambda: load_image(Image.open(file))
    yield "Pillow, of bytes", lambda: load_image(lazily)
    yield "Pillow, again", lambda: load_image(lazily)
    yield "mapping", lambda: load_image(stored)
    yield "mapping with a path", lambda: load_image({"bytes": None, "path": str(file)})
    for name, given in (("Pillow", lazily), ("bytes", content), ("mapping", stored)):
        yield (
            f"training, {name}",
            lambda g=given: from_records([record | {"image": g}])[0].images[0],
        )
        yield f"tune, {name}", lambda g=given: Row((g,), "q").load(ImageLimits())[0]
        yield f"lmms-eval, {name}", lambda g=given: opened(g, None)
    yield "training, file", lambda: open_conversations(file.parent / "t.jsonl")[0].images[0]
    yield "tune, file", lambda: read_rows(file.parent / "q.jsonl")[0].load(ImageLimits())[0]
    yield "lmms-eval, file", lambda: opened(str(file), None)


def test_pixels_do_not_depend_on_the_form(tmp_path):
    for name, (image, kind, options, known) in STORED.items():
        file = tmp_path / f"x.{kind.lower()}"
        image.save(file, kind, **options)
        expected = load_image(file)
        assert expected.size == ((4, 8) if "exif" in options else (8, 4)), name
        if known is not None:
            assert expected.getpixel(known[0]) == known[1], name
        for form, load in forms(file):
            got = load()
            assert got.mode == "RGB", (name, form)
            assert np.array_equal(np.asarray(got), np.asarray(expected)), (name, form)


def test_what_has_no_8_bit_meaning_is_refused_in_every_form(tmp_path):
    for name, (image, kind, options, said) in REFUSED.items():
        file = tmp_path / f"x.{kind.lower()}"
        image.save(file, kind, **options)
        for form, load in (("path", partial(load_image, file)), *forms(file)):
            with pytest.raises((ImageError, DataError)) as caught:
                load()
            assert said in str(caught.value), (name, form, str(caught.value))


def test_a_column_of_a_dataset_is_read_like_its_files(tmp_path):
    import datasets

    for name in ("alpha", "16 bits, turned", "cmyk", "turned", "two frames"):
        image, kind, options, _ = STORED[name]
        file = tmp_path / f"x.{kind.lower()}"
        image.save(file, kind, **options)
        expected = load_image(file).tobytes()
        content = file.read_bytes()
        paths = datasets.Dataset.from_dict({"image": [str(file)], "messages": [CHAT]})
        raw = datasets.Dataset.from_dict({"image": [content], "messages": [CHAT]})
        for rows in (paths, paths.cast_column("image", datasets.Image()), raw):
            assert from_dataset(rows)[0].images[0].tobytes() == expected, name


def test_the_caller_s_image_is_left_as_it_is():
    given = colours()
    before = given.tobytes()
    load_image(given).putpixel((0, 0), (1, 2, 3))
    assert (given.mode, given.tobytes()) == ("RGBA", before)
    plain = Image.new("RGB", (2, 2))
    load_image(plain).putpixel((0, 0), (1, 2, 3))
    assert plain.getpixel((0, 0)) == (0, 0, 0)


def test_a_damaged_pillow_image_is_refused_like_its_file(tmp_path):
    whole = io.BytesIO()
    colours("RGB").resize((200, 200)).save(whole, "JPEG")
    cut = whole.getvalue()[: len(whole.getvalue()) // 2]
    with pytest.raises(ImageError, match="damaged or cut off"):
        load_image(Image.open(io.BytesIO(cut)))
    with pytest.raises(DataError, match=r"records\[0\]: .*damaged or cut off"):
        from_records([{"image": Image.open(io.BytesIO(cut)), "messages": CHAT}])
    closed = Image.open(io.BytesIO(whole.getvalue()))
    closed.close()
    with pytest.raises(ImageError, match="Pillow image"):
        load_image(closed)


# --- what a path is relative to


def test_paths_are_relative_to_the_data_never_to_the_working_directory(tmp_path, monkeypatch):
    import datasets

    here, other, elsewhere = tmp_path / "here", tmp_path / "other", tmp_path / "elsewhere"
    for folder, colour in ((here, "red"), (other, "lime"), (elsewhere, "blue")):
        folder.mkdir()
        Image.new("RGB", (9, 9), colour).save(folder / "a.png")
    red, lime = (255, 0, 0), (0, 255, 0)
    monkeypatch.chdir(elsewhere)
    for image in ("a.png", {"path": "a.png"}, {"bytes": None, "path": "a.png"}, ["a.png"]):
        record = {"image": image, "messages": CHAT}
        (here / "t.jsonl").write_text(json.dumps(record))
        (here / "q.json").write_text(json.dumps([{"image": image, "question": "q"}]))
        made = from_records([record], image_folder=other)
        data = open_conversations(here / "t.jsonl")
        assert data[0].images[0].getpixel((0, 0)) == red
        moved = open_conversations(here / "t.jsonl", image_folder=other)
        assert moved[0].images[0].getpixel((0, 0)) == lime
        assert made[0].images[0].getpixel((0, 0)) == lime
        (asked,) = read_rows(here / "q.json")
        assert asked.load(ImageLimits())[0].getpixel((0, 0)) == red
    table = datasets.Dataset.from_dict({"image": ["a.png"], "messages": [CHAT]})
    for rows in (table, table.cast_column("image", datasets.Image(decode=False))):
        given = open_conversations(rows, image_folder=other)
        assert given[0].images[0].getpixel((0, 0)) == lime
    table.save_to_disk(str(here / "saved"))
    (here / "saved" / "a.png").write_bytes((here / "a.png").read_bytes())
    saved = open_conversations(here / "saved")
    assert saved[0].images[0].getpixel((0, 0)) == red
    saved = open_conversations(here / "saved", image_folder=other)
    assert saved[0].images[0].getpixel((0, 0)) == lime
    # Records in memory have no folder; the one of now counts, not that of reading.
    made = from_records([{"image": "a.png", "messages": CHAT}])
    monkeypatch.chdir(other)
    assert made[0].images[0].getpixel((0, 0)) == (0, 0, 255)


def test_what_is_no_image_is_refused_when_the_data_is_opened(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    for image, said in {
        "number": (5, "got 5"),
        "truth": (True, "got True"),
        "array": ({"bytes": [1, 2]}, "bytes of an image must be bytes, got"),
        "base64": ("iVBORw0KGgo" + "A" * 9000, "base64 text where a path is wanted"),
        "data": ("data:image/png;base64,iVBORw0KGgo=", "base64 text where a path is wanted"),
        "base64 as bytes": ({"bytes": "/9j/" + "A" * 9000}, "got '/9j/AAAA"),
        "missing": ({"bytes": None, "path": "nope.png"}, "no such image file: "),
        "nothing": ({"bytes": None, "path": None}, "a mapping needs bytes, or a path"),
        "empty": ({"path": ""}, "a mapping needs bytes, or a path"),
        "other keys": ({"url": "https://x.org/a.png"}, "a mapping needs bytes, or a path"),
        "address": ("https://x.org/a.png", "URLs are not fetched"),
        "address in a mapping": ({"path": "hf://x/a.png"}, "URLs are not fetched"),
        "long": ("a" * 9000 + ".png", "no such image file: "),
        "folder": (".", "no such image file: "),
        "half a character": ("\ud83d.png", "no such image file: "),
        "zero": ("a\0.png", "no such image file: "),
        "list in a list": ([["a.png"]], "got ['a.png']"),
    }.values():
        record = {"image": image, "messages": CHAT}
        (tmp_path / "t.jsonl").write_text(json.dumps({**record, "image": "a.png"}) + "\n")
        with (tmp_path / "t.jsonl").open("a") as file:
            file.write(json.dumps(record))
        for source, where in ((tmp_path / "t.jsonl", "line 2: "), ([record], "records[0]: ")):
            with pytest.raises(DataError) as caught:
                open_conversations(source, image_folder=tmp_path)
            text = str(caught.value)
            assert where in text, text
            assert said in text, text
            assert text.isprintable()
            assert len(text) < 2 * len(str(tmp_path)) + 300, text
