"""Every way to decode, with images merged, answers as it does over the caller's whole prompt.

The reference recomputes the whole conversation for every token (`recomputed.py`): what a processor,
a criterion, a beam or a cache sees there is the unwrapped model's by construction.
"""

from __future__ import annotations

import copy

import pytest
import torch
from families import llava, llava_next, llava_onevision, qwen2_5_vl
from recomputed import Recomputed
from tiny import IMAGE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CompileConfig,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
)

import pitome_vlm
from pitome_vlm.releases import CACHE_NAME

GREEDY = {"max_new_tokens": 3, "do_sample": False}
SAMPLED = {"max_new_tokens": 3, "do_sample": True}
MANY = list(range(3, 60))


def sampling_loop(model, input_ids, **call):
    """A decoding loop of the caller's own."""
    return type(model)._sample(model, input_ids, **call)


def restored_width(batch, more):
    return batch["input_ids"].shape[1] + more


# Options by what they are about; a function makes them from the batch.
MODES = {
    "sampling": [
        SAMPLED,
        SAMPLED | {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.95},
        SAMPLED | {"epsilon_cutoff": 3e-3, "eta_cutoff": 3e-3, "renormalize_logits": True},
        SAMPLED | {"num_return_sequences": 2},
    ],
    "beams": [
        GREEDY | {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.3},
        GREEDY | {"num_beams": 2, "early_stopping": True, "eos_token_id": MANY},
        SAMPLED | {"num_beams": 2},
    ],
    "repeats": [
        GREEDY | {"repetition_penalty": 3.0},
        GREEDY | {"no_repeat_ngram_size": 1},
        GREEDY | {"no_repeat_ngram_size": 2, "num_beams": 2},
        GREEDY | {"encoder_repetition_penalty": 0.5, "num_beams": 2},
        GREEDY | {"encoder_no_repeat_ngram_size": 1},
        GREEDY | {"guidance_scale": 1.5},
        GREEDY | {"guidance_scale": 2.0, "negative_prompt_ids": torch.tensor([[1, 5], [1, 6]])},
    ],
    "watermarks": [
        GREEDY
        | {
            "watermarking_config": WatermarkingConfig(
                bias=5.0, seeding_scheme="selfhash", context_width=3
            )
        },
        SAMPLED
        | {"watermarking_config": SynthIDTextWatermarkingConfig(keys=[654, 400, 836], ngram_len=5)},
    ],
    "words": [
        GREEDY | {"bad_words_ids": [[5], [7, 8]], "remove_invalid_values": True},
        GREEDY | {"sequence_bias": [[[5], 5.0], [[IMAGE, 9], 3.0]]},
        GREEDY | {"forced_bos_token_id": 9, "forced_eos_token_id": 7},
        GREEDY | {"suppress_tokens": MANY, "begin_suppress_tokens": list(range(60, 98))},
    ],
    "lengths": [
        lambda batch: {"do_sample": False, "max_length": restored_width(batch, 4)},
        lambda batch: {
            "do_sample": False,
            "max_length": restored_width(batch, 6),
            "min_length": restored_width(batch, 3),
            "eos_token_id": MANY,
        },
        GREEDY | {"min_new_tokens": 3, "eos_token_id": MANY},
        GREEDY | {"exponential_decay_length_penalty": (1, 3.0), "eos_token_id": 5},
        GREEDY | {"max_time": 100.0},
        lambda batch: {"generation_config": GenerationConfig(max_length=restored_width(batch, 3))},
    ],
    "caches": [
        GREEDY | {"use_cache": False},
        GREEDY | {"cache_implementation": "static", "disable_compile": True},
        GREEDY | {"cache_implementation": "dynamic"},
        GREEDY | {"logits_to_keep": 3},
        GREEDY | {"compile_config": CompileConfig(backend="eager")},
        GREEDY | {"custom_generate": sampling_loop},
        GREEDY | {"synced_gpus": False},
    ],
}
# Without a meaning for a model that has no cache.
OF_CACHES = {
    *("use_cache", "cache_implementation", "disable_compile", "compile_config", "logits_to_keep")
}


SETTINGS = [
    pytest.param(family, id=family.__name__, marks=[pytest.mark.slow] if tiles else [])
    for family, tiles in ((llava, 0), (llava_next, 1), (llava_onevision, 1), (qwen2_5_vl, 0))
]


@pytest.fixture(scope="module", params=SETTINGS)
def setting(request):
    """A wrapped model that never says an image placeholder, a batch, and the reference."""
    return prepared(request.param)


def prepared(family, **batch):
    model, batch = family(**batch)
    model, batch = model.double(), in_double(batch)
    model.lm_head.weight.data[IMAGE] = 0
    pitome_vlm.wrap(model, keep=0.25)
    return model, batch, Recomputed(model, batch)


def in_double(batch):
    return {n: value.double() if value.is_floating_point() else value for n, value in batch.items()}


def answers(model, batch, options):
    torch.manual_seed(0)
    return model.generate(**batch, **options)


@pytest.mark.parametrize("about", MODES)
def test_a_mode_answers_as_over_the_whole_prompt(setting, about):
    model, batch, reference = setting
    for options in MODES[about]:
        options = options(batch) if callable(options) else options
        if "guidance_scale" in options and "image_grid_thw" in batch:
            continue  # the pass without a prompt: unwrapped it fails on Qwen, or on 4.57 errs
        expected = {n: value for n, value in options.items() if n not in OF_CACHES}
        found = answers(model, batch, options)
        assert torch.equal(found, answers(reference, {}, expected)), options


class Remembers(StoppingCriteria):
    """Stops where the prompt's last word comes again; `eos_token_id` is what generate looks for."""

    eos_token_id = 2

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids)
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_what_a_caller_brings_replaces_what_generate_makes():
    model, batch, reference = prepared(llava)
    width = batch["input_ids"].shape[1]
    plain = answers(model, batch, GREEDY)
    penalty = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.01)])
    strong = GREEDY | {"repetition_penalty": 0.01}
    longer = {"do_sample": False, "stopping_criteria": StoppingCriteriaList([])}
    longer["stopping_criteria"].append(MaxLengthCriteria(width + 25))
    for options in (strong | {"logits_processor": penalty}, longer):
        found = answers(model, batch, options)
        assert torch.equal(found, answers(reference, {}, options))
    assert found.shape[1] == width + 25  # and not the 20 that generate makes without a length
    assert not torch.equal(answers(model, batch, strong), plain)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_a_criterion_sees_the_caller_s_prompt(options):
    model, batch, _ = prepared(llava)
    width, criterion = batch["input_ids"].shape[1], Remembers()
    model.generate(
        **batch, **GREEDY, **options, stopping_criteria=StoppingCriteriaList([criterion])
    )
    assert [ids.shape[1] - width for ids in criterion.seen] == [1, 2, 3]
    for ids in criterion.seen:
        copies = len(ids) // len(batch["input_ids"])  # beam search asks about candidates
        assert torch.equal(ids[:, :width], batch["input_ids"].repeat_interleave(copies, 0))


def letters(size=128):
    """A tokenizer of one character per id."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:size]
    model = models.BPE({letter: number for number, letter in enumerate(alphabet)}, [])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_stop_strings_end_where_they_would():
    model, batch, reference = prepared(llava)
    width, tokenizer = batch["input_ids"].shape[1], letters()
    # Ids of letters alone; the others are bytes that make no character.
    options = {"do_sample": False, "max_new_tokens": 6, "suppress_tokens": list(range(94, 128))}
    told = model.generate(**batch, **options)[0, width:]
    options |= {"stop_strings": [tokenizer.decode(told[2:4])], "tokenizer": tokenizer}
    found = answers(model, batch, options | {"eos_token_id": IMAGE})
    assert torch.equal(found, answers(reference, {}, options | {"eos_token_id": IMAGE}))
    assert bool((found[0, width + 4 :] == 0).all())
    assert bool((told[4:] != 0).any())


def test_padding_of_a_shortened_row_is_no_word_of_the_prompt():
    # The row with more images is the shorter one once they are merged.
    model, batch = llava(images=(1, 0), texts=(3, 120))
    model = pitome_vlm.wrap(model, keep=0.25)
    longer = torch.cat([torch.zeros(2, 4, dtype=torch.long), batch["input_ids"]], 1)
    mask = torch.nn.functional.pad(batch["attention_mask"], (4, 0))
    batch |= {"input_ids": longer, "attention_mask": mask}
    kept = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    for options in ({"repetition_penalty": 3.0}, {"no_repeat_ngram_size": 1}):
        out = model.generate(**batch, **GREEDY, **options, **kept)
        for row, ids in enumerate(batch["input_ids"]):
            changed = (out.scores[0] != out.logits[0])[row].nonzero()[:, 0].tolist()
            assert set(changed) <= set(ids.tolist())


def test_return_dict_in_generate_holds_what_was_asked_for(setting):
    model, batch, reference = setting
    kept = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    found = answers(model, batch, GREEDY | kept | {"output_hidden_states": True})
    expected = answers(reference, {}, GREEDY | kept)
    for name in ("scores", "logits"):
        torch.testing.assert_close(torch.stack(found[name]), torch.stack(expected[name]))
    shortened = found.hidden_states[0][0].shape[1]
    assert shortened < batch["input_ids"].shape[1]
    assert [step[0].shape[1] for step in found.hidden_states[1:]] == [1, 1]
    assert found[CACHE_NAME].get_seq_length() == shortened + 2
    transitions = model.compute_transition_scores(found.sequences, found.scores)
    assert transitions.shape == (len(batch["input_ids"]), 3)


def test_keep_1_samples_what_the_bare_model_samples():
    model, batch = llava()
    options = SAMPLED | {"num_return_sequences": 2}
    expected = answers(model, batch, options)
    wrapped = pitome_vlm.wrap(copy.deepcopy(model), keep=1.0)
    assert torch.equal(answers(wrapped, batch, options), expected)


def test_continuous_batching_is_refused_with_images():
    model, batch = llava()
    pitome_vlm.wrap(model, keep=0.25)
    with pytest.raises(ValueError, match="cache_implementation='paged'"):
        model.generate(**batch, **GREEDY, cache_implementation="paged")


def test_a_recipe_from_a_folder_gets_the_shortened_prompt(tmp_path):
    model, batch, reference = prepared(llava)
    (tmp_path / "custom_generate").mkdir()
    (tmp_path / "custom_generate" / "generate.py").write_text(
        "def loop(model, input_ids, **call):\n"
        "    return type(model)._sample(model, input_ids, **call)\n\n\n"
        "def generate(model, **kwargs):\n"
        "    from transformers import GenerationMixin\n"
        "    kwargs.pop('custom_generate', None)\n"
        "    return GenerationMixin.generate(model, custom_generate=loop, **kwargs)\n"
    )
    found = answers(
        model, batch, GREEDY | {"custom_generate": str(tmp_path), "trust_remote_code": True}
    )
    assert torch.equal(found, answers(reference, {}, GREEDY))


@pytest.mark.parametrize(
    "options",
    [
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "high"},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
        {"num_beams": 4, "force_words_ids": [[5, 6]]},
    ],
    ids=["contrastive", "dola", "groups", "forced words"],
)
def test_what_moved_to_the_hub_needs_the_caller_s_consent_as_unwrapped(options):
    model, batch = llava()
    messages = []
    for one in (model, pitome_vlm.wrap(copy.deepcopy(model), keep=0.25)):
        with pytest.raises(ValueError, match="trust_remote_code=True") as error:
            one.generate(**batch, **GREEDY, **options)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
