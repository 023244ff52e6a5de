"""The demo model's words and its Hugging Face processor.

Holds the vocabulary, the prompt format and the image size that the model was trained with.
transformers and tokenizers are imported only when a processor is built.

Prompt format: `<s> [system words] user: <image> question ? assistant: answer </s> user: ...`.
Text is lower-cased, "?" is a word of its own, and "color" is read as "colour".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pitome_vlm.demo.questions import NUMBER_WORDS, PLURALS, QUADRANTS
from pitome_vlm.demo.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES

if TYPE_CHECKING:
    from transformers import LlavaProcessor, PreTrainedTokenizerFast

IMAGE_SIZE = 120
PATCH_SIZE = 10
GRID = IMAGE_SIZE // PATCH_SIZE
PATCHES = GRID * GRID

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
PAD, BOS, EOS, UNKNOWN, IMAGE = range(5)
USER, ASSISTANT, QUESTION_MARK = "user:", "assistant:", "?"

_QUESTION_WORDS = (
    "what colour which is the of shape object how many are there can you see count a in picture "
    "where corner left or right above below size big number does say more than fewer yes no"
)
# Harmless words for text around the image; training mixes them so that positions vary.
_FILLER_TEXT = (
    "please look at this image carefully and answer with one word . , ! : this it here an on "
    "question short be helpful assistant about shown following only then i will ask some "
    "to me tell for photo scene second first"
)
FILLER_WORDS = tuple(_FILLER_TEXT.split())

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'] + ': ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] + ' ' }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image> ' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '</s> ' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def vocabulary() -> dict[str, int]:
    """Word to token id, special tokens first."""
    words = [
        *SPECIAL_TOKENS,
        USER,
        ASSISTANT,
        QUESTION_MARK,
        *COLOURS,
        *SHAPES,
        *NUMBER_WORDS,
        *SIZES,
        *QUADRANTS,
        *PLURALS,
        *PLURALS.values(),
        *BACKGROUNDS,
        *_QUESTION_WORDS.split(),
        *FILLER_WORDS,
    ]
    return {word: index for index, word in enumerate(dict.fromkeys(words))}


def encode_question(text: str, words: dict[str, int]) -> list[int]:
    """Token ids of a template question, "?" included, as the tokenizer would give them."""
    return [words[word] for word in text.lower().replace("?", " ?").split()]


def build_processor() -> LlavaProcessor:
    """The processor that belongs to the demo checkpoint, built from code alone."""
    return processor_of(vocabulary(), IMAGE_SIZE, PATCH_SIZE, ([0.5] * 3, [0.5] * 3))


def processor_of(
    words: dict[str, int], size: int, patch: int, normalised: tuple[list[float], list[float]]
) -> LlavaProcessor:
    """A processor with the demo's prompt format.

    Args:
        words: to token ids; the special tokens are those of the demo.
        size: of the square that images are shrunk to, in pixels.
        patch: of a patch.
        normalised: mean and deviation by channel, of values in [0, 1].
    """
    from transformers import CLIPImageProcessor, LlavaProcessor

    image_processor = CLIPImageProcessor(
        do_resize=True,
        size={"height": size, "width": size},
        do_center_crop=False,
        image_mean=normalised[0],
        image_std=normalised[1],
        do_convert_rgb=True,
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=_build_tokenizer(words),
        patch_size=patch,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def _build_tokenizer(words: dict[str, int]) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    spaced = [normalizers.Replace(mark, f" {mark} ") for mark in "?.,!"]
    core.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace("color", "colour"), *spaced]
    )
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        model_max_length=512,
        # No token types: the model takes none, and release 4.57 would write them by default.
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
