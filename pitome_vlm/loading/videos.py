"""Videos: some frames of a local file, read within limits, or refused in one line."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..common import require, shown, whole_number


class VideoError(ValueError):
    """A video that cannot be used; the message names the file, the problem and the limit."""


@dataclass(frozen=True)
class VideoLimits:
    """Limits for video files.

    Attributes:
        max_bytes: size of the file, >= 1.
        max_pixels: width x height of a frame, >= 1.
        max_frames: frames in the file, >= 1; all up to the last one that is taken are decoded.
        max_taken: frames that are taken, >= 1.
    """

    max_bytes: int = 500_000_000
    max_pixels: int = 40_000_000
    max_frames: int = 200_000
    max_taken: int = 1024

    def __post_init__(self) -> None:
        for field, value in vars(self).items():
            whole_number(field, value, 1)


_DEFAULT_LIMITS = VideoLimits()


@dataclass(frozen=True)
class Video:
    """Frames of a video, in order.

    Attributes:
        frames: RGB images of one size.
        indices: the number of each in the file, from 0.
        total: frames in the file.
        fps: frames of the file in a second.
    """

    frames: list[Image.Image]
    indices: list[int]
    total: int
    fps: float

    def metadata(self) -> dict[str, Any]:
        """What processors of transformers want to know: timestamps follow from it."""
        return {
            "total_num_frames": self.total,
            "fps": self.fps,
            "duration": self.total / self.fps,
            "frames_indices": self.indices,
            "width": self.frames[0].width,
            "height": self.frames[0].height,
            "video_backend": "pyav",
        }


def load_video(
    path: str | os.PathLike[str], frames: int, limits: VideoLimits = _DEFAULT_LIMITS
) -> Video:
    """Read frames at equal distances, the first and the last among them.

    Args:
        path: a local file in a format of FFmpeg's.
        frames: how many, at least 1; all where the video has fewer.
        limits: on the file and on what is taken of it.

    Raises:
        ImportError: PyAV is not installed.
        VideoError: missing, not a regular file, too large, or not a video that can be decoded.
        ValueError: `frames` is out of range.
    """
    frames = whole_number("frames", frames, 1, limits.max_taken)
    require("av", "video", "reading a video")
    name, file = shown(os.fspath(path)), Path(path).expanduser()
    if not file.is_file():
        kind = "is a folder" if file.is_dir() else "no such file"
        raise VideoError(f"{name}: {kind}; give the path of a video file")
    size = file.stat().st_size
    if size > limits.max_bytes:
        raise VideoError(f"{name} has {size:,} bytes; the limit is {limits.max_bytes:,}")
    av = importlib.import_module("av")
    try:
        return _read(av, file, frames, name, limits)
    except (av.error.FFmpegError, OSError, IndexError) as error:
        said = " ".join(str(error).split())[:100]
        raise VideoError(f"{name}: cannot be read as a video ({said})") from error


def _read(av: Any, file: Path, frames: int, name: str, limits: VideoLimits) -> Video:
    with av.open(str(file)) as container:
        stream = container.streams.video[0]
        pixels = stream.width * stream.height
        if pixels > limits.max_pixels:
            raise VideoError(
                f"{name} has frames of {pixels:,} pixels; the limit is {limits.max_pixels:,}"
            )
        fps = float(stream.average_rate or stream.guessed_rate or 24)
        # Not by the header, which may be wrong or silent: packets are counted without decoding.
        total = sum(packet.size > 0 for packet in container.demux(stream))
    if not 0 < total <= limits.max_frames:
        raise VideoError(f"{name} has {total:,} frames; 1 to {limits.max_frames:,} can be read")
    wanted = np.unique(np.linspace(0, total - 1, min(frames, total)).round().astype(int)).tolist()
    taken = {}
    with av.open(str(file)) as container:
        for index, frame in enumerate(container.decode(video=0)):
            if index in wanted:
                taken[index] = _upright(frame)
            if index == wanted[-1]:
                break
    if not taken:
        raise VideoError(f"{name}: no frame can be decoded")
    return Video(list(taken.values()), list(taken), total, fps)


def _upright(frame: Any) -> Image.Image:
    """A frame as an RGB image, turned as its file says."""
    image: Image.Image = frame.to_image()
    turned = int(getattr(frame, "rotation", 0) or 0)
    return image.rotate(turned, expand=True) if turned else image
