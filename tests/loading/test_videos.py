"""Frames of video files, and what is refused in one line."""

from __future__ import annotations

import av
import numpy as np
import pytest
from absent import hide

from pitome_vlm.loading.videos import VideoError, VideoLimits, load_video


def write(path, frames=20):
    """A video of 32 x 48 pixels, ten frames a second, every frame redder than the one before."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for number in range(frames):
            pixels = np.zeros((32, 48, 3), np.uint8)
            pixels[..., 0] = 12 * number
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def test_frames_are_at_equal_distances(tmp_path):
    path = write(tmp_path / "a.mp4")
    for wanted, numbers in ((1, [0]), (2, [0, 19]), (4, [0, 6, 13, 19]), (50, [*range(20)])):
        video = load_video(path, wanted)
        assert video.indices == numbers
        assert (video.total, video.fps) == (20, 10)
        reds = [float(np.asarray(frame)[..., 0].mean()) for frame in video.frames]
        assert reds == pytest.approx([12 * number for number in numbers], abs=16)
        assert {frame.size for frame in video.frames} == {(48, 32)}
    told = video.metadata()
    assert (told["duration"], told["width"], told["height"]) == (2, 48, 32)


def test_what_cannot_be_read_is_refused_in_a_line(tmp_path, monkeypatch):
    path, text = write(tmp_path / "a.mkv", 3), tmp_path / "b.mp4"
    text.write_text("no video")
    for own, options, said in (
        (tmp_path / "none.mp4", {}, "no such file"),
        (tmp_path, {}, "is a folder"),
        (text, {}, "cannot be read as a video"),
        (path, {"max_bytes": 100}, "the limit is 100"),
        (path, {"max_pixels": 1000}, r"1,536 pixels; the limit is 1,000"),
        (path, {"max_frames": 2}, r"3 frames; 1 to 2 can be read"),
    ):
        with pytest.raises(VideoError, match=said) as found:
            load_video(own, 4, VideoLimits(**options))
        assert "\n" not in str(found.value)
    for frames in (0, 2000):
        with pytest.raises(ValueError, match="frames must be"):
            load_video(path, frames)
    hide(monkeypatch, "av")
    with pytest.raises(ImportError, match=r'needs av; install it with: pip install "\.\[video\]"'):
        load_video(path, 4)
