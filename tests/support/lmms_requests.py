"""Requests as lmms-eval makes them, about the demo questions, and the library's own answers."""

from __future__ import annotations

import functools

import pitome_vlm
from pitome_vlm.demo import checkpoint_path, load_split
from pitome_vlm.lmms.tasks import demo_vqa
from pitome_vlm.measure import demo_benchmark as benchmark
from pitome_vlm.merge.config import MergeConfig

SHORT = {"max_new_tokens": 3, "do_sample": False}
QUARTER = MergeConfig(keep=0.25)


def messages(doc):
    text = {"type": "text", "text": doc["question"]}
    parts = [{"type": "image", "url": image} for image in demo_vqa.doc_to_visual(doc)]
    return [{"role": "user", "content": [*parts, text]}]


def instance(kind, doc_id, *arguments, **metadata):
    from lmms_eval.api.instance import Instance

    metadata = {"task": "demo_vqa", "doc_id": doc_id, "repeats": 1, **metadata}
    return Instance(kind, (*arguments, doc_id, "demo_vqa", "test"), 0, metadata)


def question(doc_id, to_messages=messages, options=SHORT, **metadata):
    args = ("", to_messages, dict(options))
    request = instance("generate_until", doc_id, *args, **metadata)
    return request


def continuation(doc_id, text, docs):
    to_visual = demo_vqa.doc_to_visual
    return instance("loglikelihood", doc_id, docs[doc_id]["question"], text, to_visual)


def texts(results):
    return [result.text for result in results]


@functools.cache
def library_model():
    return pitome_vlm.load(checkpoint_path(), dtype="float32")


def library(config, limit):
    model, processor = library_model()
    setting = benchmark.Setting("library", config)
    samples = load_split("test", limit)
    (outcome,) = benchmark.run(model, processor, [setting], samples, split="test", batch_size=16)
    return outcome
