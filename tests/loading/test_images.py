"""Image files: what is read, what is refused, and with which message."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from pitome_vlm.loading.images import ImageError, ImageLimits, load_image

FORMATS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "BMP": "bmp", "GIF": "gif", "TIFF": "tif"}


def noise(width=64, height=48, mode="RGB"):
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(values.squeeze(), mode)


def png_header(width, height):
    """A PNG that claims a size and holds no pixels."""

    def chunk(name, content):
        body = name + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def refuses(source, *said, limits=None):
    """`load_image` raises one line that says all of `said`, and warns of nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError) as caught:
            load_image(source) if limits is None else load_image(source, limits)
    text = str(caught.value)
    assert "\n" not in text
    for part in said:
        assert str(part) in text, text
    return text


class TestAccepted:
    @pytest.mark.parametrize("kind", FORMATS)
    def test_formats(self, tmp_path, kind):
        file = tmp_path / f"x.{FORMATS[kind]}"
        noise().save(file, kind)
        image = load_image(file)
        assert (image.mode, image.size) == ("RGB", (64, 48))
        if kind in ("PNG", "BMP", "TIFF"):
            assert np.array_equal(np.asarray(image), np.asarray(noise()))

    def test_format_is_by_content(self, tmp_path):
        noise().save(tmp_path / "x.jpg", "PNG")
        assert load_image(str(tmp_path / "x.jpg")).size == (64, 48)

    def test_open_file(self):
        buffer = io.BytesIO()
        noise().save(buffer, "PNG")
        buffer.seek(0)
        assert np.array_equal(np.asarray(load_image(buffer)), np.asarray(noise()))

    def test_exif_orientation(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6  # rotate by 90 degrees clockwise to view
        noise().save(tmp_path / "x.png", exif=exif)
        expected = noise().transpose(Image.Transpose.ROTATE_270)
        assert np.array_equal(np.asarray(load_image(tmp_path / "x.png")), np.asarray(expected))

    def test_broken_exif_does_not_hide_the_image(self, tmp_path):
        noise().save(tmp_path / "x.png", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff junk")
        assert load_image(tmp_path / "x.png").size == (64, 48)

    def test_alpha_on_white(self, tmp_path):
        image = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
        image.putpixel((1, 0), (255, 0, 0, 128))
        image.save(tmp_path / "x.png")
        loaded = load_image(tmp_path / "x.png")
        assert loaded.getpixel((0, 0)) == (255, 255, 255)
        assert loaded.getpixel((1, 0)) == (255, 127, 127)

    def test_transparent_palette_on_white(self, tmp_path):
        image = Image.new("P", (1, 1), 0)
        image.putpalette([10, 20, 30])
        image.save(tmp_path / "x.png", transparency=0)
        assert load_image(tmp_path / "x.png").getpixel((0, 0)) == (255, 255, 255)

    def test_16_bit_grey_is_scaled(self, tmp_path):
        Image.fromarray(np.array([[0, 128 * 256, 65535]], dtype=np.uint16)).save(tmp_path / "x.png")
        assert np.asarray(load_image(tmp_path / "x.png"))[0, :, 0].tolist() == [0, 128, 255]

    def test_first_frame(self, tmp_path):
        frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
        frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
        assert load_image(tmp_path / "x.gif").getpixel((0, 0)) == (255, 0, 0)

    def test_outlives_the_file(self, tmp_path):
        noise().save(tmp_path / "x.png")
        image = load_image(tmp_path / "x.png")
        (tmp_path / "x.png").unlink()
        assert image.resize((2, 2)).size == (2, 2)

    def test_exactly_at_the_limits(self, tmp_path):
        file = tmp_path / "x.png"
        noise().save(file)
        limits = ImageLimits(max_bytes=file.stat().st_size, max_pixels=64 * 48)
        assert load_image(file, limits).size == (64, 48)


class TestRefused:
    @pytest.mark.parametrize("kind", FORMATS)
    @pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
    def test_cut_off(self, tmp_path, kind, share):
        file = tmp_path / f"x.{FORMATS[kind]}"
        noise().save(file, kind)
        content = file.read_bytes()
        file.write_bytes(content[: int(len(content) * share)])
        refuses(file, file, "damaged")

    def test_a_jpg_that_is_not_an_image(self, tmp_path):
        file = tmp_path / "x.jpg"
        file.write_text("<html>not found</html>")
        refuses(file, file, "not an image", "PNG", "JPEG")

    def test_format_that_is_not_allowed(self, tmp_path):
        noise().save(tmp_path / "x.png", "PPM")
        refuses(tmp_path / "x.png", "not an image", "allowed formats")

    @pytest.mark.parametrize("side", [7_000, 10_000, 14_143, 40_000])
    def test_too_many_pixels_before_decoding(self, tmp_path, side):
        # 49, 100, 200 and 1600 million: ours only, Pillow warns, Pillow refuses (twice).
        file = tmp_path / "x.png"
        file.write_bytes(png_header(side, side))
        refuses(file, file, side * side, "1..40000000 pixels")

    def test_too_many_bytes(self, tmp_path):
        file = tmp_path / "x.png"
        noise().save(file)
        size = file.stat().st_size
        refuses(file, file, size, "1..100 bytes", limits=ImageLimits(max_bytes=100))
        with file.open("rb") as handle:
            refuses(handle, file, "more than 100", limits=ImageLimits(max_bytes=100))

    def test_empty(self, tmp_path):
        (tmp_path / "x.png").touch()
        refuses(tmp_path / "x.png", tmp_path / "x.png", "0 bytes")
        refuses(io.BytesIO(), "0 bytes")

    @pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
    def test_zero_size(self, tmp_path, size):
        (tmp_path / "x.png").write_bytes(png_header(*size))
        refuses(tmp_path / "x.png", tmp_path / "x.png")

    def test_missing(self, tmp_path):
        refuses(tmp_path / "x.png", tmp_path / "x.png", "no such file")

    def test_folder(self, tmp_path):
        refuses(tmp_path, tmp_path, "folder")

    def test_url(self):
        refuses("https://example.org/cat.jpg", "https://example.org/cat.jpg", "not fetched")

    @pytest.mark.parametrize("name", ["a\x00b.png", "a\nb.png", "\ud83d.png", "x" * 5000])
    def test_impossible_name(self, name):
        text = refuses(name, repr(name).strip("'")[:90])
        assert len(text) < 300
        assert text.isprintable()

    def test_wrong_kinds_of_argument(self, tmp_path):
        with pytest.raises(TypeError, match=r"must be a path, bytes.* got int"):
            load_image(3)
        with pytest.raises(TypeError, match="binary mode"):
            load_image(io.StringIO("x"))

    @pytest.mark.parametrize("field", ["max_bytes", "max_pixels"])
    @pytest.mark.parametrize("value", [0, -1, 1.5, True, None])
    def test_bad_limits(self, field, value):
        with pytest.raises((TypeError, ValueError), match=f"{field} must be (a whole|at least 1)"):
            ImageLimits(**{field: value})


class TestOtherLibraries:
    def test_pillow_switched_to_lenient_elsewhere_changes_nothing(self, tmp_path, monkeypatch):
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
        whole = io.BytesIO()
        noise().save(whole, "JPEG")
        (tmp_path / "cut.jpg").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
        refuses(tmp_path / "cut.jpg", "cut.jpg")
        assert ImageFile.LOAD_TRUNCATED_IMAGES is True
