"""Save a LLaVA with random weights in any shape, for load tests without a download.

    python -m scripts.serving.random_llava /tmp/random --image-size 336 --patch-size 14
    python -m scripts.serving.load --model /tmp/random --keep 1.0 0.25 -o load

    python -m scripts.serving.random_llava /tmp/seven --shape llava-1.5-7b --no-weights
    python -m scripts.serving.load --model /tmp/seven --vllm "--load-format dummy" -o load

Answers are noise; what a server does with its time is not. Words and processor are the demo's.
"""

from __future__ import annotations

import argparse

import torch
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from pitome_vlm.demo.processor import BOS, EOS, IMAGE, PAD, build_processor, vocabulary
from pitome_vlm.measure.bench import configuration


def shape_of(options: argparse.Namespace) -> LlavaConfig:
    """A configuration with the demo's words."""
    if options.shape:
        config = configuration(options.shape)
        if config.model_type != "llava":
            raise SystemExit(f"--shape must be a LLaVA-1.5's, got {options.shape}")
        config.text_config.update({"vocab_size": len(vocabulary()), "pad_token_id": PAD})
        config.text_config.update({"bos_token_id": BOS, "eos_token_id": EOS})
        config.image_token_id = IMAGE
        return config
    vision = CLIPVisionConfig(
        hidden_size=options.vision_width,
        intermediate_size=4 * options.vision_width,
        num_hidden_layers=options.vision_layers,
        num_attention_heads=options.vision_width // 64,
        image_size=options.image_size,
        patch_size=options.patch_size,
    )
    text = LlamaConfig(
        vocab_size=len(vocabulary()),
        hidden_size=options.text_width,
        intermediate_size=3 * options.text_width,
        num_hidden_layers=options.text_layers,
        num_attention_heads=options.text_width // 64,
        max_position_embeddings=2048,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--shape", help="of `pitome-vlm bench --config`, in place of all below")
    parser.add_argument(
        "--no-weights", action="store_true", help="for vLLM's --load-format dummy, which draws them"
    )
    parser.add_argument("--image-size", type=int, default=336)
    parser.add_argument("--patch-size", type=int, default=14)
    parser.add_argument("--vision-width", type=int, default=256)
    parser.add_argument("--vision-layers", type=int, default=8)
    parser.add_argument("--text-width", type=int, default=512)
    parser.add_argument("--text-layers", type=int, default=8)
    options = parser.parse_args()
    config = shape_of(options)
    vision = config.vision_config
    config.image_seq_length = (vision.image_size // vision.patch_size) ** 2
    config.architectures = [LlavaForConditionalGeneration.__name__]
    torch.manual_seed(0)
    with torch.device("meta" if options.no_weights else "cpu"):
        model = LlavaForConditionalGeneration(config)
    if options.no_weights:
        config.save_pretrained(options.folder)
        GenerationConfig.from_model_config(config).save_pretrained(options.folder)
    else:
        model.save_pretrained(options.folder)
    processor = build_processor()
    side = vision.image_size
    processor.image_processor.size = {"height": side, "width": side}
    processor.patch_size = vision.patch_size
    processor.save_pretrained(options.folder)
    million = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(
        f"{options.folder}: {million:.0f} million parameters, {config.image_seq_length} visual "
        "tokens per image"
    )


if __name__ == "__main__":
    main()
