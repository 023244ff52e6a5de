"""The answer that a command must print, by transformers' own calls."""

from __future__ import annotations

from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

import pitome_vlm


def expected_answer(folder: str, image: str, question: str, new_tokens: int, **budget) -> str:
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    if budget:
        pitome_vlm.wrap(model, **budget)
    inputs = processor(
        images=Image.open(image), text=f"user: <image> {question} assistant:", return_tensors="pt"
    )
    out = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    new = out[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(new, skip_special_tokens=True).strip()
