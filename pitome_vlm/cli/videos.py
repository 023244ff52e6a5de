"""Options of commands that look at videos, and what they come to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from . import options as o

if TYPE_CHECKING:
    from ..loading.videos import Video

Videos = Annotated[
    list[str] | None,
    o.plain(
        "Video file, for models that take videos; can be repeated (needs PyAV).", "FILE", "--video"
    ),
]
Frames = Annotated[
    int, o.plain("Frames to sample from a video, evenly spaced.", "N", "--frames", min=1)
]
Temporal = Annotated[
    bool,
    o.plain(
        "Merge consecutive frames of a video with each other, as many as `--option "
        "temporal_window=N` says.",
        None,
        "--temporal",
    ),
]


def load_videos(paths: Sequence[Path | str], frames: int) -> list[Video]:
    """So many frames of every file, within the limits of `loading.VideoLimits`."""
    from ..loading.videos import load_video

    return [load_video(path, frames) for path in paths]


def temporal_option(temporal: bool, videos: Sequence[str] | None) -> dict[str, Any]:
    """`--temporal` as a merge option; refused where no video is given."""
    if temporal and not videos:
        raise ValueError("--temporal merges frames of a video; give one with --video")
    return {"temporal": True} if temporal else {}


def check_videos(model: Any, videos: Sequence[Video]) -> None:
    """Refuse videos that a model does not take."""
    from ..adapters import find_adapter
    from ..wrapping.wrap import base_model

    base = base_model(model)
    if videos and "video" not in find_adapter(base).pixel_inputs.values():
        raise ValueError(f"--video: {type(base).__name__} takes no videos; give --image FILE")
