"""One tiny model of every family that is wrapped by an adapter of its own, with a batch."""

from __future__ import annotations

from tiny import tiny_batch, tiny_model
from tiny_anyres import anyres_batch, anyres_model
from tiny_qwen import qwen, qwen_batch
from tiny_video import video_batch, video_model, video_pixels


def llava(**batch):
    return tiny_model(), tiny_batch(**{"images": (1, 1), "texts": (3, 9)} | batch)


def llava_next(texts=(3, 9), **batch):
    model = anyres_model("next")
    return model, anyres_batch(model, (((100, 180),), ((90, 90),)), texts, **batch)


def llava_onevision(texts=(3, 9), **batch):
    model = anyres_model("onevision")
    return model, anyres_batch(model, (((100, 180),), ((90, 90),)), texts, **batch)


def onevision_video(**batch):
    model = video_model("onevision")
    return model, video_batch(model, video_pixels(), **batch)


def qwen2_5_vl(texts=(3, 9), **batch):
    model = qwen()
    return model, qwen_batch(model, [[(1, 8, 8)], [(1, 4, 16)]], texts, **batch)


IMAGE_FAMILIES = (llava, llava_next, llava_onevision, qwen2_5_vl)
FAMILIES = (*IMAGE_FAMILIES, onevision_video)
