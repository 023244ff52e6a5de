"""`forward` and `generate` with images of any size: the usual contract, fewer tokens inside."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import IMAGE
from tiny_anyres import anyres_batch, anyres_model, anyres_pixels

import pitome_vlm
from pitome_vlm.releases import CACHE_NAME, cache_of
from pitome_vlm.training.shorten import shorten

GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(params=["next", "onevision_resampled"])
def model(request):
    return pitome_vlm.wrap(anyres_model(request.param), keep=0.25)


def recomputed(model, batch, steps):
    """Greedy answers without any cache, every step from the pixels on."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for _ in range(steps):
        call = batch | {"input_ids": ids, "attention_mask": mask}
        with torch.no_grad():
            logits = model(**call, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return ids


def test_greedy_with_a_cache_equals_recomputing_everything(model):
    batch = anyres_batch(model)
    assert torch.equal(model.generate(**batch, **GREEDY), recomputed(model, batch, 6))


@pytest.mark.parametrize(
    "options",
    [{"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": None}],
)
def test_other_caches_answer_alike(model, options):
    batch = anyres_batch(model)
    expected = model.generate(**batch, **GREEDY)
    assert torch.equal(expected, model.generate(**batch, **GREEDY, **options))


def test_rows_answer_as_they_do_alone(model):
    rows = (((100, 180),), ((150, 60), (90, 90)), ((1, 500),))
    batch = anyres_batch(model, rows=rows, texts=(5, 9, 3))
    options = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    together = torch.stack(model.generate(**batch, **options).logits, 1)
    first = 0
    for index, row in enumerate(rows):
        ids = batch["input_ids"][index : index + 1, batch["attention_mask"][index] == 1]
        part = slice(first, first + len(row))
        alone = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=batch["pixel_values"][part],
            image_sizes=batch["image_sizes"][part],
            **options,
        )
        torch.testing.assert_close(
            together[index : index + 1], torch.stack(alone.logits, 1), atol=2e-3, rtol=1e-3
        )
        first += len(row)


def test_beams_equal_each_row_alone(model):
    rows = (((100, 180),), ((90, 90),))
    batch = anyres_batch(model, rows=rows, texts=(5, 5))
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3, "num_return_sequences": 2}
    together = model.generate(**batch, **options)
    assert torch.equal(together[::2, : batch["input_ids"].shape[1]], batch["input_ids"])
    for index in range(2):
        ids = batch["input_ids"][index : index + 1, batch["attention_mask"][index] == 1]
        alone = model.generate(
            input_ids=ids,
            pixel_values=batch["pixel_values"][index : index + 1],
            image_sizes=batch["image_sizes"][index : index + 1],
            **options,
        )
        assert torch.equal(alone[:, -5:], together[2 * index : 2 * index + 2, -5:])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_gives_the_same_logits(model, side):
    batch = anyres_batch(model, side=side)
    with torch.no_grad():
        out = model(**batch)
        compact = pitome_vlm.compact_inputs(model, **batch)
        again = model(**compact)
    torch.testing.assert_close(out.logits, again.logits, atol=1e-5, rtol=1e-5)
    assert "image_sizes" not in compact
    other = anyres_batch(model, side="left" if side == "right" else "right")
    with torch.no_grad():
        swapped = pitome_vlm.compact_inputs(model, **other)
        logits = model(**swapped).logits
    for row in range(2):
        one = out.logits[row][compact["attention_mask"][row] == 1]
        two = logits[row][swapped["attention_mask"][row] == 1]
        torch.testing.assert_close(one, two, atol=1e-3, rtol=1e-3)


def test_a_shortened_batch_computes_the_same(model):
    batch = anyres_batch(model)
    batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, -100)
    short = shorten(model, batch)
    assert short["input_ids"].shape[1] < batch["input_ids"].shape[1]
    with torch.no_grad():
        one, two = model(**batch), model(**short)
    assert two.logits.shape[1] == short["labels"].shape[1]
    torch.testing.assert_close(one.loss, two.loss)
    torch.testing.assert_close(one.logits, two.logits)


def more_words(sequences, rows):
    extra = torch.randint(3, 90, (rows, 3), generator=torch.Generator().manual_seed(4))
    return torch.cat([sequences, extra], 1)


@pytest.mark.parametrize("with_pixels", [False, True])
@pytest.mark.parametrize("rows", [(((100, 180),),), (((100, 180), (90, 90)),)])
def test_a_chat_continues_with_its_cache(model, rows, with_pixels):
    batch = anyres_batch(model, rows=rows, texts=(5,))
    first = model.generate(**batch, **GREEDY, return_dict_in_generate=True)
    ids = more_words(first.sequences, 1)
    vision = {name: batch[name] for name in ("pixel_values", "image_sizes")}
    fresh = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **vision, **GREEDY)
    went_on = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=first.past_key_values,
        **GREEDY,
        **(vision if with_pixels else {}),
    )
    assert torch.equal(fresh, went_on)


def test_a_chat_of_two_rows_with_images_of_other_sizes_continues(model):
    batch = anyres_batch(model, rows=(((100, 180),), ((90, 90),)), texts=(5, 5))
    first = model.generate(**batch, **GREEDY, return_dict_in_generate=True)
    ids = more_words(first.sequences, 2)
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 9, dtype=torch.long)], 1)
    vision = {name: batch[name] for name in ("pixel_values", "image_sizes")}
    fresh = model.generate(input_ids=ids, attention_mask=mask, **vision, **GREEDY)
    went_on = model.generate(
        input_ids=ids, attention_mask=mask, past_key_values=first.past_key_values, **GREEDY
    )
    assert torch.equal(fresh, went_on)


def test_forward_adds_an_image_of_another_size_to_a_cache(model):
    one = anyres_batch(model, rows=(((100, 180),),), texts=(4,))
    two = anyres_batch(model, rows=(((90, 90),),), texts=(6,), seed=3)
    with torch.no_grad():
        cache = cache_of(model(**one, use_cache=True))
        whole = torch.ones(1, cache.get_seq_length() + two["input_ids"].shape[1]).long()
        continued = model(**two | {"attention_mask": whole}, **{CACHE_NAME: cache}).logits
        tiles = max(one["pixel_values"].shape[1], two["pixel_values"].shape[1])

        def padded(pixels):
            return torch.nn.functional.pad(pixels, (0,) * 7 + (tiles - pixels.shape[1],))

        both = {
            "input_ids": torch.cat([one["input_ids"], two["input_ids"]], 1),
            "pixel_values": torch.cat([padded(one["pixel_values"]), padded(two["pixel_values"])]),
            "image_sizes": torch.cat([one["image_sizes"], two["image_sizes"]]),
        }
        together = model(**both).logits
    torch.testing.assert_close(continued, together[:, -continued.shape[1] :], atol=2e-3, rtol=1e-3)


def test_a_chat_whose_image_the_cache_does_not_hold_is_refused(model):
    words = torch.randint(3, 90, (1, 9), generator=torch.Generator().manual_seed(0))
    first = model.generate(words, **GREEDY, return_dict_in_generate=True)
    later = anyres_batch(model, rows=(((90, 90),),), texts=(4,))
    ids = torch.cat([first.sequences, later["input_ids"]], 1)
    with pytest.raises(ValueError, match="pass the pixels of all its images"):
        model.generate(input_ids=ids, past_key_values=first.past_key_values, **GREEDY)


def test_embeddings_in_place_of_ids(model):
    batch = anyres_batch(model)
    ids = batch.pop("input_ids")
    with torch.no_grad():
        expected = model(input_ids=ids, **batch).logits
        embeds = model.get_input_embeddings()(ids)
        found = model(inputs_embeds=embeds, **batch).logits
    # Padded columns hold another embedding, and nothing reads them.
    torch.testing.assert_close(expected[:, -5:], found[:, -5:])


def test_copies_are_independent_and_unwrapping_leaves_nothing(model):
    batch = anyres_batch(model)
    kept = copy.deepcopy(model)
    pitome_vlm.unwrap(model)
    with torch.no_grad():
        assert kept(**batch).logits.shape[1] < model(**batch).logits.shape[1]
    assert not any("pitome" in name for module in model.modules() for name in vars(module))


def test_outputs_carry_the_merged_features(model):
    batch = anyres_batch(model)
    with torch.no_grad():
        out = model(**batch)
        visual = pitome_vlm.encode_images(
            model, batch["pixel_values"], image_sizes=batch["image_sizes"]
        )
    newer = hasattr(out, "image_outputs")  # transformers 5.24: one tensor for every image
    found = torch.cat(list(out.image_outputs.pooler_output)) if newer else out.image_hidden_states
    torch.testing.assert_close(found, torch.cat(visual.features))


def test_a_mixture_of_text_rows_and_image_rows(model):
    batch = anyres_batch(model, rows=((), ((90, 90),), ()), texts=(9, 4, 6))
    text = anyres_pixels(model, [(90, 90)])
    assert torch.equal(text["pixel_values"], batch["pixel_values"])
    assert torch.equal(model.generate(**batch, **GREEDY), recomputed(model, batch, 6))


def test_a_language_model_with_sliding_windows():
    model = anyres_model("onevision")
    text = model.config.text_config
    text.use_sliding_window, text.sliding_window = True, 64
    text.layer_types = ["full_attention", "sliding_attention"]
    model = type(model)(model.config).eval()
    model.generation_config.pad_token_id = 0
    pitome_vlm.wrap(model, keep=0.25)
    batch = anyres_batch(model)
    assert model.generate(**batch, **GREEDY).shape[1] == batch["input_ids"].shape[1] + 6
