"""Tiny checkpoints of many families on disk, each with its own family's processor.

Processors of families that take videos, and Pixtral's, need torchvision to be loaded.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import tiny_families
import tiny_qwen
import transformers as hf
from tiny_family import END, IMAGE, START, VIDEO

from pitome_vlm.demo.processor import CHAT_TEMPLATE, build_processor, vocabulary

TORCHVISION = importlib.util.find_spec("torchvision") is not None

CLASSES = {"internvl": "InternVLProcessor", "smolvlm": "SmolVLMProcessor"}
CLASSES |= {"qwen3_vl": "Qwen3VLProcessor", "glm4v": "Glm4vProcessor"}
CLASSES |= {"mistral3": "PixtralProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor"}
CLASSES |= {"qwen3_5": "Qwen3VLProcessor", "lfm2_vl": "Lfm2VlProcessor"}
NEEDS_TORCHVISION = tuple(CLASSES)

# The tiny models' ids of what stands around images (tests/support/tiny_families_*.py).
MARKS = {IMAGE: "<image>", VIDEO: "<video>", START: "<start>", END: "<end>", 95: "<break>"}
MARKS |= {94: "<corner>"}


def tokenizer(start: str = "<start>", *, image: str = "<image>", more=None, **named: str):
    """A few words of the demo and the marks of images; `named` tokens are attributes.

    `image` is the token of a feature, `more` further marks by number.
    """
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    words = {word: number for word, number in vocabulary().items() if number < 90}
    words = {("<gap>" if word == "<image>" else word): n for word, n in words.items()}
    filled = {f"<{number}>": number for number in range(90, 128)}
    marks = MARKS | {START: start, IMAGE: image} | (more or {})
    names = {number: f"<{number}>" for number in range(90, 128)} | marks
    words |= {names[number]: number for number in filled.values()}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.normalizer = build_processor().tokenizer.backend_tokenizer.normalizer
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(
        [AddedToken(mark, normalized=False, special=True) for mark in marks.values()]
    )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        extra_special_tokens=named,
    )


def internvl(config):
    named = {"start_image_token": "<start>", "end_image_token": "<end>"}
    words = tokenizer(context_image_token="<image>", video_token="<video>", **named)
    return hf.InternVLProcessor(
        images("GotOcr2", size={"height": 64, "width": 64}, min_patches=1, max_patches=4),
        words,
        videos("InternVL"),
        image_seq_length=16,
        chat_template=CHAT_TEMPLATE,
    )


def idefics(kind, config):
    photos = images(kind, size={"longest_edge": 128}, max_image_size={"longest_edge": 64})
    words = tokenizer("<fake_token_around_image>", image_token="<image>")
    rest = [videos(kind)] if kind == "SmolVLM" else []
    return getattr(hf, f"{kind}Processor")(
        photos, words, *rest, image_seq_len=16, chat_template=CHAT_TEMPLATE
    )


def qwen2_5_vl(config):
    size = {"shortest_edge": 28 * 28, "longest_edge": 112 * 112}
    words = tokenizer(image_token="<image>", video_token="<video>")
    return hf.Qwen2_5_VLProcessor(
        images("Qwen2VL", size=size),
        words,
        videos("Qwen2VL", size=size),
        chat_template=CHAT_TEMPLATE.replace("<image>", "<start><image><end>"),
    )


def qwen3_vl(config, kind="Qwen3VL"):
    size = {"shortest_edge": 32 * 32, "longest_edge": 96 * 96}
    patches = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    words = tokenizer(image_token="<image>", video_token="<video>")
    return hf.Qwen3VLProcessor(
        images("Qwen2VL", size=size, **patches),
        words,
        videos("Qwen3VL", **patches),
        chat_template=CHAT_TEMPLATE.replace("<image>", "<start><image><end>"),
    )


def glm4v(config):
    size = {"shortest_edge": 32 * 32 * 2, "longest_edge": 96 * 96 * 2}
    patches = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    words = tokenizer(image_token="<image>", video_token="<video>")
    return hf.Glm4vProcessor(
        images("Glm4v", size=size, **patches),
        words,
        videos("Glm4v", **patches),
        chat_template=CHAT_TEMPLATE.replace("<image>", "<start><image><end>"),
    )


def mistral3(config):
    names = {"image_token": "<image>", "image_break_token": "<break>", "image_end_token": "<end>"}
    return hf.PixtralProcessor(
        images("Pixtral", size={"longest_edge": 64}, patch_size=8),
        tokenizer(),
        patch_size=4,
        spatial_merge_size=2,
        chat_template=CHAT_TEMPLATE,
        **names,
    )


def gemma3(config):
    words = tokenizer(image_token="<image>", boi_token="<start>", eoi_token="<end>")
    return hf.Gemma3Processor(
        images("Gemma3", size={"height": 64, "width": 64}),
        words,
        image_seq_length=16,
        chat_template=CHAT_TEMPLATE.replace("<image>", "<start>"),
    )


def paligemma(config):
    """Published checkpoints have no chat template."""
    photos = images("Siglip", size={"height": 32, "width": 32}, image_seq_length=16)
    return hf.PaliGemmaProcessor(photos, tokenizer(image_token="<image>"))


def aya_vision(config):
    """An image is written as <image>, its features as another token."""
    names = {"start_of_img_token": "<start>", "end_of_img_token": "<end>"}
    names |= {"img_patch_token": "<patch>", "tile_token": "<tile>", "tile_global_token": "<whole>"}
    return hf.AyaVisionProcessor(
        images("GotOcr2", size={"height": 64, "width": 64}, min_patches=1, max_patches=4),
        tokenizer(image="<patch>", more={93: "<image>", 92: "<tile>", 91: "<whole>"}),
        **names,
        img_size=64,
        patch_size=8,
        downsample_factor=2,
        chat_template=CHAT_TEMPLATE,
    )


def lfm2_vl(config):
    names = {"image_token": "<image>", "image_start_token": "<start>", "image_end_token": "<end>"}
    tiles = {"tile_size": 32, "min_image_tokens": 4, "max_image_tokens": 24, "max_tiles": 4}
    return hf.Lfm2VlProcessor(
        images("Lfm2Vl", encoder_patch_size=4, **tiles),
        tokenizer(**names, image_thumbnail_token="<corner>"),
        chat_template=CHAT_TEMPLATE,
    )


def images(kind, **options):
    suffix = "" if TORCHVISION else "Pil"
    return getattr(hf, f"{kind}ImageProcessor{suffix}")(**options)


def videos(kind, **options):
    return getattr(hf, f"{kind}VideoProcessor")(**options) if TORCHVISION else None


PROCESSORS = {
    "internvl": internvl,
    "smolvlm": lambda config: idefics("SmolVLM", config),
    "idefics3": lambda config: idefics("Idefics3", config),
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "qwen3_5": qwen3_vl,
    "glm4v": glm4v,
    "mistral3": mistral3,
    "gemma3": gemma3,
    "paligemma": paligemma,
    "aya_vision": aya_vision,
    "lfm2_vl": lfm2_vl,
}


def model_of(name: str):
    return tiny_qwen.qwen(name) if name == "qwen2_5_vl" else tiny_families.FAMILIES[name].model()


def save_family(name: str, folder: Path) -> Path:
    model = model_of(name)
    model.save_pretrained(folder)
    if TORCHVISION or name not in NEEDS_TORCHVISION:
        PROCESSORS[name](model.config).save_pretrained(folder)
    else:
        # What a checkpoint looks like; nothing of it can be loaded here.
        tokenizer().save_pretrained(folder)
        kind = CLASSES[name]
        values = json.dumps({"processor_class": kind})
        (folder / "processor_config.json").write_text(values)
        (folder / "preprocessor_config.json").write_text(values)
    return folder
