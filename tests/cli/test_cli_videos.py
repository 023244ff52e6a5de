"""`ask` and `chat` about videos: what reaches the processor, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from absent import hide
from cli_runner import fails_in_one_line, run
from PIL import Image

from pitome_vlm.cli import videos
from pitome_vlm.cli.engine import Conversation
from pitome_vlm.loading.videos import Video
from pitome_vlm.measure import asking

VIDEO = Video([Image.new("RGB", (8, 6), (n, 0, 0)) for n in (10, 20)], [0, 9], 10, 5.0)


class Recorder:
    """A processor that notes what it is given."""

    image_token, video_token, chat_template = "<image>", "<video>", None
    bos_token = eos_token = pad_token = None

    def __call__(self, **given):
        self.given = given
        return {}


def test_the_processor_gets_all_frames_and_their_times():
    processor = Recorder()
    talk = Conversation(None, processor, images=[Image.new("RGB", (4, 4))], videos=[VIDEO])
    text = asking.prompt_text(processor, talk._messages("what is it"))
    assert text == "USER: <image>\n<video>\nwhat is it ASSISTANT:"
    asking.encoded(processor, [text], talk.images, videos=talk.videos)
    ((first, second),) = processor.given["videos"]
    assert np.array_equal(first, np.asarray(VIDEO.frames[0]))
    assert second[0, 0, 0] == 20
    assert processor.given["do_sample_frames"] is False
    (told,) = processor.given["video_metadata"]
    assert (told["frames_indices"], told["fps"], told["total_num_frames"]) == ([0, 9], 5.0, 10)
    talk.turns = [("what is it", "a square")]
    later = asking.prompt_text(processor, talk._messages("and its colour"))
    assert later.count("<video>") == 1
    with pytest.raises(ValueError, match="videos are put before the question"):
        asking.checked_question("what is <video>", processor)
    talk.show(videos=[VIDEO])
    assert (talk.images, talk.turns) == ([], [])


def test_what_cannot_be_asked_is_one_line(checkpoint, image, monkeypatch):
    words = ["ask", "--model", checkpoint, "--keep", 0.25]
    fails_in_one_line(run(*words, "q"), "give --image FILE, or --video FILE")
    said = "--temporal merges frames of a video; give one with --video"
    fails_in_one_line(run(*words, "--image", image, "--temporal", "q"), said)
    with monkeypatch.context() as patch:
        patch.setattr(videos, "load_videos", lambda paths, frames: [VIDEO])
        fails_in_one_line(run(*words, "--video", "v.mp4", "q"), "takes no videos")
    hide(monkeypatch, "av")
    fails_in_one_line(run(*words, "--video", "v.mp4", "q"), "reading a video needs av")
