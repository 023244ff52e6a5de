"""A stand-in for flash kernels, which need a GPU.

It is registered under a flash implementation's name, refuses what those kernels refuse (float
masks, unequal widths, widths that are no multiple of 8) and computes plain attention otherwise,
with logits and sums in at least float32 as they do.
"""

from __future__ import annotations

import torch

FLASH = ["flash_attention_2", "flash_attention_3", "kernels-community/vllm-flash-attn3"]
