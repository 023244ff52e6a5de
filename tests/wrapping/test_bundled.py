"""The bundled checkpoint through plain transformers calls: a real processor, real answers."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

import pitome_vlm
from pitome_vlm.demo import checkpoint_path, load_split, scene_image
from pitome_vlm.measure.asking import question_prompt
from pitome_vlm.measure.demo_benchmark import ask, batches

QUESTIONS = 36


@pytest.fixture(scope="module")
def bundled():
    path = checkpoint_path()
    model, report = LlavaForConditionalGeneration.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval(), AutoProcessor.from_pretrained(path)


def right(model, processor, samples):
    answers = []
    for batch in batches(processor, samples, "val", 12):
        answers += ask(model, processor, batch)
    return sum(a == s.answer for a, s in zip(answers, samples, strict=True))


@pytest.mark.slow
def test_it_answers_and_keeps_answering_with_fewer_tokens(bundled):
    model, processor = bundled
    samples = load_split("val", QUESTIONS)
    assert right(model, processor, samples) >= 0.85 * QUESTIONS
    with pitome_vlm.wrapped(model, keep=0.5):
        assert right(model, processor, samples) >= 0.7 * QUESTIONS
    blind = {"tokens": 1, "algorithm": "pool"}  # one token of grey is no image
    with pitome_vlm.wrapped(model, **blind):
        assert right(model, processor, samples) < 0.6 * QUESTIONS


def test_batches_of_real_prompts_answer_as_alone(bundled):
    model, processor = bundled
    samples = load_split("val", 8)
    with pitome_vlm.wrapped(model, keep=0.25):
        together = [
            a for b in batches(processor, samples, "val", 4) for a in ask(model, processor, b)
        ]
        alone = [a for b in batches(processor, samples, "val", 1) for a in ask(model, processor, b)]
    assert together == alone


def test_an_untouched_processor_and_two_images(bundled):
    model, processor = bundled
    sample = load_split("val", 1)[0]
    image, text = scene_image(sample.scene_id, "val"), question_prompt(processor, sample.question)
    two = processor(images=[image, image], text="<image> " + text, return_tensors="pt")
    assert (two["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<image>")).sum() == 288
    with pitome_vlm.wrapped(model, keep=0.25):
        out = model.generate(**two, max_new_tokens=3, do_sample=False)
        visual = pitome_vlm.encode_images(model, two["pixel_values"])
    assert torch.equal(out[:, : two["input_ids"].shape[1]], two["input_ids"])
    assert torch.equal(visual.features[0], visual.features[1])
