"""Small models with a record in the library to serve, and prompts for them."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
import transformers as hf
from served_models import spread
from served_tiled import reference_tiled, save_images, tiled_requests, video_requests
from tokenizers import AddedToken

from pitome_vlm import MergeConfig
from pitome_vlm.demo.processor import BOS, EOS, PAD, build_processor, vocabulary

# What the library answers, for environments with a transformers on which it wraps no such model:
# of every request all answers that changes of the last bits of its pixels lead to.
WRITTEN = Path(__file__).with_name("pooled_answers.json")
DRAWS = 8
CONFIG = MergeConfig(keep=0.25)
BUDGETS = [None, {"keep": 1.0}, {"tokens": 20}, {"keep": 1 / 3}]
SIDE = 64
WORDS = {"vocab_size": 0, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2}
WORDS |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
WORDS |= {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 5}
VISION |= {"num_attention_heads": 4}


def words(*marks: str, **named: str):
    """The demo's words and marks of images; `named` tokens are attributes of the tokenizer."""
    tokenizer = build_processor().tokenizer
    tokenizer.add_tokens([AddedToken(mark, normalized=False, special=True) for mark in marks])
    tokenizer._set_model_specific_special_tokens(named)
    return tokenizer


def internvl():
    tokenizer = words(
        "<video>",
        "<img>",
        "</img>",
        context_image_token="<image>",
        video_token="<video>",
        start_image_token="<img>",
        end_image_token="</img>",
    )
    square = {"height": SIDE, "width": SIDE}
    processor = hf.InternVLProcessor(
        hf.GotOcr2ImageProcessor(size=square, min_patches=1, max_patches=4, crop_to_patches=True),
        tokenizer,
        hf.InternVLVideoProcessor(size=square),
        image_seq_length=64,
    )
    tower = {"image_size": [SIDE, SIDE], "patch_size": [4, 4], "use_qk_norm": True}
    config = hf.InternVLConfig(
        vision_config=hf.InternVLVisionConfig(**VISION, **tower),
        text_config=hf.Qwen2Config(**WORDS | {"vocab_size": len(tokenizer)}),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=64,
        tie_word_embeddings=False,
    )
    return hf.InternVLForConditionalGeneration(config), processor


def gemma3():
    """Windows of fewer tokens than a prompt has, and rotary positions of two kinds."""
    tokenizer = words(
        *("\n", "\n\n", "\n\n\n", "\n\n\n\n", "<start>", "<end>"),
        image_token="<image>",
        boi_token="<start>",
        eoi_token="<end>",
    )
    square = {"height": SIDE, "width": SIDE}
    images = hf.Gemma3ImageProcessor(size=square)
    processor = hf.Gemma3Processor(images, tokenizer, image_seq_length=64)
    text = WORDS | {"vocab_size": len(tokenizer), "head_dim": 32, "query_pre_attn_scalar": 2}
    text |= {"sliding_window": 48, "layer_types": ["sliding_attention", "full_attention"]}
    text |= {"tie_word_embeddings": False}
    config = hf.Gemma3Config(
        vision_config=hf.SiglipVisionConfig(**VISION, image_size=SIDE, patch_size=4),
        text_config=hf.Gemma3TextConfig(**text),
        mm_tokens_per_image=64,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        boi_token_index=tokenizer.convert_tokens_to_ids("<start>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<end>"),
        tie_word_embeddings=False,
    )
    return hf.Gemma3ForConditionalGeneration(config), processor


MODELS = {"internvl": internvl, "gemma3": gemma3}
# Of weights with which few answers hang on the last bits of the pixels.
SEEDS = {"internvl": 0, "gemma3": 2}
# What stands for an image in a prompt.
MARKS = {"internvl": "<image>", "gemma3": "<start>"}


def save_pooled(folder: Path, model_type: str) -> str:
    """A random checkpoint; weights are large enough for answers to depend on everything."""
    model, processor = MODELS[model_type]()
    # Releases of transformers draw other numbers while they build it.
    torch.manual_seed(SEEDS[model_type])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, spread(name))
            elif name.endswith(".bias"):
                parameter.zero_()
        if model_type == "gemma3":
            # It multiplies them by 11, next to which what layers add would not be seen.
            model.get_input_embeddings().weight.mul_(0.05)
            for layer in model.model.language_model.layers:
                layer.post_attention_layernorm.weight.fill_(2.0)
                layer.post_feedforward_layernorm.weight.fill_(1.0)
        # Marks are not answered.
        model.lm_head.weight[4] = 0
        model.lm_head.weight[len(vocabulary()) :] = 0
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def pooled_requests(kind: str, paths: list[str]) -> list[dict]:
    """Twenty of zero, one and two images, InternVL's with videos, of four budgets."""
    requests = tiled_requests(paths) + (video_requests(paths) if kind == "internvl" else [])
    return [
        {
            **one,
            "prompt": one["prompt"].replace("<image>", MARKS[kind]),
            "pitome": BUDGETS[number % 4],
        }
        for number, one in enumerate(requests)
    ]


def library(kind: str, path: str, requests: list[dict], *, merged: bool = True, noise=None):
    """The library's answers. On a CPU vLLM lets no token of an image see a later one, as here."""
    unseen = ("token_type_ids", "mm_token_type_ids") if kind == "gemma3" else ()
    config = CONFIG if merged else None
    return reference_tiled(path, requests, config, unseen=unseen, noise=noise)


def write_answers() -> None:
    """Write down what the library answers, see `WRITTEN`."""
    with tempfile.TemporaryDirectory() as name:
        folder, kept = Path(name), {}
        for kind in MODELS:
            path = save_pooled(folder / kind, kind)
            requests = pooled_requests(kind, save_images(folder / "images"))
            noise = torch.Generator().manual_seed(0)
            own = [library(kind, path, requests)]
            own += [library(kind, path, requests, noise=noise) for _ in range(DRAWS)]
            # Without those that are there already.
            kept[kind] = [
                list(map(list, dict.fromkeys(map(_fixed, one)))) for one in zip(*own, strict=True)
            ]
    WRITTEN.write_text(json.dumps(kept) + "\n")


def _fixed(answer):
    return answer[0], tuple(answer[1])


if __name__ == "__main__":
    write_answers()
