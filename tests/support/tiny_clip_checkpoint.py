"""A tiny CLIP with a processor in a folder, for whatever loads checkpoints."""

from __future__ import annotations

import transformers as hf
from tiny_encoders import SIDE, TINY

from pitome_vlm.demo import resolve


def tokenizer():
    """That of the bundled model, which knows a few hundred words."""
    found = hf.AutoTokenizer.from_pretrained(resolve("demo"))
    found.model_max_length = 16
    return found


def image_processor(kind="CLIP"):
    """Of a tiny encoder; the variant that needs Pillow only, where there are two."""
    name = f"{kind}ImageProcessor"
    chosen = getattr(hf, f"{name}Pil", None) or getattr(hf, name)
    size = {"height": SIDE, "width": SIDE}
    more = {"do_center_crop": False} if kind == "CLIP" else {}
    return chosen(size=size, **more)


def model(words=None):
    """CLIP with a vocabulary of that size."""
    built = TINY["clip"].model()
    config = built.config
    config.text_config.vocab_size = words or len(tokenizer())
    return TINY["clip"].drawn(type(built)(config))


def save(folder):
    """Write model and processor; returns the folder."""
    model().save_pretrained(folder)
    made = hf.CLIPProcessor(image_processor=image_processor(), tokenizer=tokenizer())
    made.save_pretrained(folder)
    return str(folder)
