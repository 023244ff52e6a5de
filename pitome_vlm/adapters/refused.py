"""Families of transformers that are not merged, and why."""

from __future__ import annotations

# What speaks against a family, and the values of `config.model_type` it is about.
_TYPES: dict[str, tuple[str, ...]] = {
    "its images become a fixed number of queries, which lie on no grid and are few already": (
        *("instructblip", "instructblipvideo", "idefics2", "aria", "kosmos-2", "kosmos-2.5"),
    ),
    "its images are read by cross-attention, not as tokens of the prompt": (
        *("mllama", "idefics"),
    ),
    "its language model reads no image tokens; wrap() merges inside its encoder (encoders.md)": (
        *("blip-2", "blip"),
    ),
    "an encoder reads its prompts, and positions of merged tokens are known for decoders only": (
        *("florence2", "t5gemma2"),
    ),
    "its images are words of the vocabulary, which have no mean": ("chameleon", "emu3"),
    "it has no vision tower, patches are embedded like words": ("fuyu",),
    "its tower comes from timm, with which merging was never run": (
        *("perception_lm", "fast_vlm", "gemma3n"),
    ),
    "features of every layer come packed for a layer of the language model each": (
        "granite4_vision",
    ),
    "its own code puts features into the prompt and has no function that returns them": (
        "phi4_multimodal",
    ),
    "in transformers 5.24 its forward fails on prompts of text alone, unmerged": ("llama4",),
}
REFUSED = {name: reason for reason, names in _TYPES.items() for name in names}
