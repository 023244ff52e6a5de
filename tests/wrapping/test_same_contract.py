"""What the unwrapped model accepts means the same on the wrapped one, in every family."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from accelerate import Accelerator
from families import IMAGE_FAMILIES, llava, llava_next, llava_onevision
from tiny import tiny_batch, tiny_model
from transformers.cache_utils import DynamicCache
from transformers.generation.streamers import BaseStreamer

import pitome_vlm
from pitome_vlm.releases import CACHE_NAME, EMBEDS_NEED_EMPTY_CACHE

GREEDY = {"max_new_tokens": 6, "do_sample": False}
PADDED = ("input_ids", "attention_mask", "mm_token_type_ids")


@pytest.fixture(params=IMAGE_FAMILIES, ids=lambda family: family.__name__)
def family(request):
    return request.param


def one_row(batch, row):
    """The row of a batch that has one image in every row, without its padding."""
    shown = batch["attention_mask"][row].bool()
    alone = {name: batch[name][row][shown][None] for name in PADDED if name in batch}
    for name, value in batch.items():
        if name in PADDED:
            continue
        if name == "pixel_values" and "image_grid_thw" in batch:
            lengths = batch["image_grid_thw"].prod(1).tolist()
            alone[name] = value.split(lengths)[row]
        else:
            alone[name] = value[row : row + 1]
    return alone


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_mask_that_is_left_out_is_inferred_from_padding(family, side):
    model, batch = family(side=side)
    given = {name: value for name, value in batch.items() if name != "attention_mask"}
    pitome_vlm.wrap(model, keep=0.25)
    expected = model.generate(**batch, **GREEDY)
    assert torch.equal(model.generate(**given, **GREEDY), expected)
    ids = given.pop("input_ids")
    assert torch.equal(model.generate(ids, **given, **GREEDY), expected)
    # Where padding also ends answers nothing can be inferred: all columns count, as unwrapped.
    whole = batch | {"attention_mask": torch.ones_like(batch["attention_mask"])}
    ends = GREEDY | {"eos_token_id": [0, 2], "min_new_tokens": 6}
    assert torch.equal(model.generate(ids, **given, **ends), model.generate(**whole, **ends))


def test_prompt_lookup_answers_as_greedy_decoding(family):
    model, batch = family()
    model, alone = model.double(), one_row(batch, 1)
    alone["pixel_values"] = alone["pixel_values"].double()
    # The end of the prompt repeats a run of its words, so that there are guesses from the start.
    words = alone["input_ids"][:, -4:]
    longer = {n: torch.cat([alone[n], alone[n][:, -4:]], 1) for n in PADDED if n in alone}
    alone |= longer | {"input_ids": torch.cat([alone["input_ids"], words], 1)}
    pitome_vlm.wrap(model, keep=0.25)
    greedy = GREEDY | {"eos_token_id": 2}  # transformers 4.57 cannot guess without one
    expected = model.generate(**alone, **greedy)
    for guesses in (1, 3):
        found = model.generate(**alone, **greedy, prompt_lookup_num_tokens=guesses)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("family", [llava, llava_next, llava_onevision])
def test_a_mask_over_part_of_an_image_reaches_its_merged_tokens(family):
    # Not for Qwen, whose own function for positions takes no such mask.
    model, batch = family()
    ids, mask = batch["input_ids"], batch["attention_mask"].clone()
    image = ids == model.config.image_token_id
    numbers = image.long().cumsum(1)
    mask[image & (numbers % 3 == 0)] = 0
    pitome_vlm.wrap(model, keep=0.25)
    hidden = pitome_vlm.compact_inputs(model, **batch | {"attention_mask": mask})
    plain = pitome_vlm.compact_inputs(model, **batch)
    seen = hidden["attention_mask"] != 0
    # Merged tokens stand for the patches that are visible, text for itself.
    assert int(hidden["token_sizes"][seen].sum()) == int(mask.sum())
    assert hidden["token_sizes"].shape == plain["token_sizes"].shape
    all_hidden = batch["attention_mask"].masked_fill(image, 0)
    blind = model(**batch | {"attention_mask": all_hidden}).logits[:, -1]
    pixels = torch.randn_like(batch["pixel_values"])
    other = model(**batch | {"attention_mask": all_hidden, "pixel_values": pixels})
    torch.testing.assert_close(other.logits[:, -1], blind)


def test_a_new_image_in_a_later_turn_needs_its_own_pixels_only(family):
    model, batch = family()
    first, second = one_row(batch, 0), one_row(batch, 1)
    pitome_vlm.wrap(model, keep=0.25)
    cache = DynamicCache(config=model.config.get_text_config())
    told = model.generate(**first, **GREEDY, **{CACHE_NAME: cache})
    ids = torch.cat([told, second["input_ids"]], 1)
    conversation = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in batch:
        conversation["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    new = {name: value for name, value in second.items() if name not in PADDED}
    every = {name: batch[name] for name in new}
    if EMBEDS_NEED_EMPTY_CACHE:
        # Unwrapped, this release cannot do it either.
        for pixels in (new, every):
            with pytest.raises(ValueError, match="cannot add an image to a cache"):
                model.generate(**conversation, **pixels, **GREEDY, **{CACHE_NAME: cache})
        return
    answers = [
        model.generate(**conversation, **pixels, **GREEDY, **{CACHE_NAME: copy.deepcopy(cache)})
        for pixels in (new, every)
    ]
    fresh = model.generate(**conversation, **every, **GREEDY)
    assert torch.equal(answers[0], fresh)
    assert torch.equal(answers[1], fresh)


def autocast(model):
    return Accelerator(cpu=True, mixed_precision="bf16").prepare(model)


def compiled(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def logged(model):
    inner = model.generate
    model.generate = lambda *args, **kwargs: inner(*args, **kwargs)
    return model


@pytest.mark.parametrize(
    "put_on", [autocast, pytest.param(compiled, marks=pytest.mark.slow), logged]
)
def test_unwrap_succeeds_after_other_libraries(put_on):
    batch = tiny_batch(images=(1,), texts=(5,))
    plain = tiny_model()
    with torch.no_grad():
        expected = put_on(plain)(**batch).logits
    answer = plain.generate(**batch, **GREEDY)
    model = put_on(pitome_vlm.wrap(tiny_model(), keep=0.25))
    own = {"forward", "generate"} & model.__dict__.keys()
    with torch.no_grad():
        assert model(**batch).logits.shape[1] < expected.shape[1]
        pitome_vlm.unwrap(model)
        assert own <= model.__dict__.keys()
        assert torch.equal(model(**batch).logits, expected)
    assert torch.equal(model.generate(**batch, **GREEDY), answer)


class Seen(BaseStreamer):
    def __init__(self):
        self.values, self.ended = [], False

    def put(self, value):
        self.values.append(value)

    def end(self):
        self.ended = True


def test_a_streamer_gets_the_caller_s_prompt():
    model, batch, seen = tiny_model(), tiny_batch(images=(1,), texts=(5,)), Seen()
    pitome_vlm.wrap(model, keep=0.25)
    out = model.generate(**batch, **GREEDY, streamer=seen)
    assert torch.equal(seen.values[0], batch["input_ids"])
    assert seen.ended
    assert torch.cat([value.flatten() for value in seen.values]).tolist() == out[0].tolist()


@pytest.mark.parametrize(
    "option", [{"encoder_repetition_penalty": 3.0}, {"encoder_no_repeat_ngram_size": 1}]
)
def test_processors_of_the_prompt_see_the_caller_s(option):
    model, batch = tiny_model(), tiny_batch(images=(1,), texts=(9,))
    pitome_vlm.wrap(model, keep=0.25)
    kept = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    out = model.generate(**batch, **GREEDY, **option, **kept)
    words = batch["input_ids"].unique()
    changed = (out.scores[0] != out.logits[0])[0].nonzero()[:, 0]
    assert len(changed)
    assert set(changed.tolist()) <= set(words.tolist())


def test_a_tuple_holds_what_the_output_holds(family):
    model, batch = family()
    pitome_vlm.wrap(model, keep=0.25)
    with torch.no_grad():
        output, values = model(**batch), model(**batch, return_dict=False)
    assert len(values) == len(output.to_tuple())
    assert torch.equal(values[0], output.logits)
    cache = next(value for value in values if hasattr(value, "get_seq_length"))
    step = {"input_ids": torch.tensor([[3], [4]]), CACHE_NAME: cache}
    again = {"input_ids": torch.tensor([[3], [4]]), CACHE_NAME: output[CACHE_NAME]}
    with torch.no_grad():
        torch.testing.assert_close(model(**step).logits, model(**again).logits)


def test_labels_of_another_length_name_both_lengths():
    model, batch = llava()
    pitome_vlm.wrap(model, keep=0.25)
    width = batch["input_ids"].shape[1]
    with pytest.raises(ValueError, match=f"20 columns, but the prompt has {width}"):
        model(**batch, labels=batch["input_ids"][:, :20])


def test_right_padding_is_warned_of_as_on_the_bare_model():
    seen = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    logger = logging.getLogger("transformers.generation.utils")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        for keep in (1.0, 0.25):
            model, batch = llava(side="right")
            pitome_vlm.wrap(model, keep=keep).generate(**batch, **GREEDY)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    found = [message for message in seen if "right-padding was detected" in message]
    assert len(found) == 2
    assert found[0] == found[1]


def test_what_compact_inputs_made_can_be_generated_from(family):
    model, batch = family()
    pitome_vlm.wrap(model, keep=0.25)
    width = batch["input_ids"].shape[1]
    expected = model.generate(**batch, **GREEDY)[:, width:]
    compact = pitome_vlm.compact_inputs(model, **batch)
    assert torch.equal(model.generate(**compact, **GREEDY), expected)
    logits = model(**compact).logits[:, -1]
    torch.testing.assert_close(logits, model(**batch).logits[:, -1])


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"num_return_sequences": 2}])
def test_a_constraint_sees_the_caller_s_prompt(options):
    model, batch = llava()
    pitome_vlm.wrap(model, keep=0.25)
    seen = []

    def allowed(row, ids):
        seen.append((row, ids))
        return list(range(128))

    sampled = {"do_sample": True} if "num_return_sequences" in options else {}
    call = GREEDY | {"max_new_tokens": 2} | sampled | options
    model.generate(**batch, **call, prefix_allowed_tokens_fn=allowed)
    # From release 5.24 on all copies of a row have its number; before, samples had their own.
    old = CACHE_NAME == "past_key_values"
    copies = options.get("num_return_sequences", 1) if old else 1
    assert {row for row, _ in seen} == set(range(2 * copies))
    width = batch["input_ids"].shape[1]
    for row, ids in seen:
        assert torch.equal(ids[:width], batch["input_ids"][row // copies])


def test_chunks_of_the_model_s_own_config_are_refused_too():
    model, batch = llava()
    pitome_vlm.wrap(model, keep=0.25)
    model.generation_config.prefill_chunk_size = 8
    with pytest.raises(ValueError, match="prefill_chunk_size=8"):
        model.generate(**batch, **GREEDY)


def test_image_features_are_the_bare_model_s():
    model, batch = llava()
    with torch.no_grad():
        bare = model.get_image_features(pixel_values=batch["pixel_values"])
        pitome_vlm.wrap(model, keep=0.25)
        own = model.get_image_features(pixel_values=batch["pixel_values"])
    features = [getattr(one, "pooler_output", one) for one in (bare, own)]
    assert all(torch.equal(*pair) for pair in zip(*features, strict=True))
