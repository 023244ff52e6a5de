"""Drafts by another model: answers stay those of greedy decoding, drafts are about the image."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from families import llava, llava_next, llava_onevision, qwen2_5_vl
from peft import LoraConfig, get_peft_model
from test_modes import letters
from test_same_contract import one_row
from tiny import IMAGE
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import pitome_vlm
from pitome_vlm.releases import CACHE_NAME

TOKENS = 12
# transformers 4.57 cannot guess without a token that ends answers.
GREEDY = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": IMAGE}


SETTINGS = [
    pytest.param(family, id=family.__name__, marks=[pytest.mark.slow] if tiles else [])
    for family, tiles in ((llava, 0), (llava_next, 1), (llava_onevision, 1), (qwen2_5_vl, 0))
]


@pytest.fixture(scope="module", params=SETTINGS)
def setting(request):
    return prepared(request.param)


def prepared(family):
    model, batch = family()
    model, batch = model.double(), one_row(batch, 1)
    batch["pixel_values"] = batch["pixel_values"].double()
    model.lm_head.weight.data[IMAGE] = 0
    model.generation_config.num_assistant_tokens = 5
    model.generation_config.num_assistant_tokens_schedule = "constant"
    model.generation_config.assistant_confidence_threshold = 0.0
    return model, batch


def text_model(words=128):
    torch.manual_seed(1)
    sizes = {"vocab_size": words, "hidden_size": 32, "intermediate_size": 64}
    config = LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=4)
    return LlamaForCausalLM(config).eval().double()


def passes(model, run):
    """What `run` returns, and how often it called the model's forward."""
    counted = []
    handle = model.register_forward_hook(lambda *_: counted.append(1))
    try:
        return run(), len(counted)
    finally:
        handle.remove()


def test_an_assistant_of_any_kind_leaves_the_answer_as_it_is(setting):
    bare, batch = setting
    model = pitome_vlm.wrap(copy.deepcopy(bare), keep=0.25)
    expected = model.generate(**batch, **GREEDY)
    helpers = {
        "bare": copy.deepcopy(bare),
        "wrapped": pitome_vlm.wrap(copy.deepcopy(bare), keep=0.25),
        "wrapped otherwise": pitome_vlm.wrap(copy.deepcopy(bare), keep=0.5),
        "text": text_model(),
    }
    for name, helper in helpers.items():
        run = functools.partial(model.generate, **batch, **GREEDY, assistant_model=helper)
        found, count = passes(model, run)
        assert torch.equal(found, expected), name
        if name == "wrapped":
            # Its drafts are what the model says: six tokens a pass, the model's own one included.
            assert count <= TOKENS // 6 + 1


def test_a_model_with_nothing_to_merge_takes_a_wrapped_assistant(setting):
    bare, batch = setting
    expected = bare.generate(**batch, **GREEDY)
    helper = pitome_vlm.wrap(copy.deepcopy(bare), keep=0.25)
    model = pitome_vlm.wrap(copy.deepcopy(bare), keep=1.0)
    assert torch.equal(model.generate(**batch, **GREEDY, assistant_model=helper), expected)
    with pytest.raises(ValueError, match="needs a wrapped main model"):
        bare.generate(**batch, **GREEDY, assistant_model=helper)


@pytest.mark.slow
def test_assistants_with_processors_lengths_and_adapters():
    bare, batch = prepared(llava)
    model = pitome_vlm.wrap(copy.deepcopy(bare), keep=0.25)
    width = batch["input_ids"].shape[1]
    lora = LoraConfig(target_modules=r".*language_model.*q_proj", r=2)
    helpers = (
        pitome_vlm.wrap(copy.deepcopy(bare), keep=0.25),
        pitome_vlm.wrap(get_peft_model(copy.deepcopy(bare), lora), keep=0.5),
    )
    for options in (
        GREEDY | {"repetition_penalty": 3.0},
        GREEDY | {"no_repeat_ngram_size": 2},
        {"do_sample": False, "eos_token_id": IMAGE, "max_length": width + 7},
        GREEDY | {"do_sample": True, "top_k": 1},
    ):
        expected = model.generate(**batch, **options)
        for helper in helpers:
            found = model.generate(**batch, **options, assistant_model=helper)
            assert torch.equal(found, expected), options


def test_what_is_learnt_about_an_assistant_is_kept_as_unwrapped():
    bare, batch = prepared(llava)
    model = pitome_vlm.wrap(copy.deepcopy(bare), keep=0.25)
    helper = copy.deepcopy(model)
    helper.generation_config.num_assistant_tokens_schedule = "heuristic"
    model.generate(**batch, **GREEDY, assistant_model=helper)
    assert helper.generation_config.num_assistant_tokens > 5  # all drafts were right


def test_drafts_in_a_later_turn():
    bare, batch = prepared(llava)
    model = pitome_vlm.wrap(copy.deepcopy(bare), keep=0.25)
    cache = DynamicCache(config=model.config.get_text_config())
    told = model.generate(**batch, **GREEDY, **{CACHE_NAME: cache})
    ids = torch.cat([told, torch.tensor([[5, 6, 7]])], 1)
    turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(**turn, **GREEDY, **{CACHE_NAME: copy.deepcopy(cache)})
    pixels = {"pixel_values": batch["pixel_values"]}
    wrapped = copy.deepcopy(model)
    for helper, images in ((wrapped, pixels), (bare, pixels), (bare, {})):
        kept = {CACHE_NAME: copy.deepcopy(cache), "assistant_model": helper}
        assert torch.equal(model.generate(**turn, **images, **GREEDY, **kept), expected)
    lookup = {CACHE_NAME: copy.deepcopy(cache), "prompt_lookup_num_tokens": 3}
    assert torch.equal(model.generate(**turn, **GREEDY, **lookup), expected)
    with pytest.raises(ValueError, match="pass the pixel_values of all images"):
        model.generate(**turn, **GREEDY, **{CACHE_NAME: cache}, assistant_model=wrapped)


def test_an_assistant_with_another_tokenizer():
    bare, batch = prepared(llava)
    model = pitome_vlm.wrap(bare, keep=0.25)
    options = GREEDY | {"suppress_tokens": list(range(94, 128))}  # letters alone
    expected = model.generate(**batch, **options)
    pair = {"tokenizer": letters(), "assistant_tokenizer": letters(120)}
    found = model.generate(**batch, **options, **pair, assistant_model=text_model(120))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("option", [{"use_mtp": True}, {"speculation_type": "dflash"}])
def test_drafts_from_the_model_s_own_states_are_refused(option):
    bare, batch = prepared(llava)
    model = pitome_vlm.wrap(bare, keep=0.25)
    with pytest.raises(ValueError, match=f"{next(iter(option))}=.* use prompt_lookup_num_tokens"):
        model.generate(**batch, **GREEDY, **option)
