"""generate and forward keep their contract with fewer tokens inside."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tiny import IMAGE, KINDS, PATCHES, tiny_batch, tiny_model
from transformers import TextStreamer
from transformers.cache_utils import DynamicCache

import pitome_vlm
from pitome_vlm.adapters.hf_llava import HFLlavaAdapter
from pitome_vlm.releases import CACHE_NAME

GREEDY = {"max_new_tokens": 6, "do_sample": False}
STAGES = ["tower", "projector", "both"]


@pytest.fixture
def model():
    return pitome_vlm.wrap(tiny_model(), keep=0.25)


def told(mask, sizes):
    """Causal mask with log(size) on the keys, written out: [B, 1, S, S]."""
    batch, width = mask.shape
    floats = torch.full((batch, 1, width, width), torch.finfo(torch.float32).min)
    for row in range(batch):
        for query in range(width):
            for key in range(query + 1):
                # A padded query sees itself: nobody reads what comes out.
                if mask[row, key] or key == query:
                    floats[row, 0, query, key] = math.log(sizes[row, key])
    return floats


def recompute(model, batch, steps):
    """Greedy decoding without cache and without generate: the whole sequence at every step."""
    compact = pitome_vlm.compact_inputs(model, **batch)
    embeds, positions, sizes = (
        compact[name] for name in ("inputs_embeds", "position_ids", "token_sizes")
    )
    mask = compact.get("attention_mask", torch.ones(embeds.shape[:2], dtype=torch.long))
    chosen = []
    with torch.no_grad():
        for _ in range(steps):
            logits = model(
                inputs_embeds=embeds, attention_mask=told(mask, sizes), position_ids=positions
            ).logits[:, -1]
            chosen.append(logits.argmax(-1))
            new = model.get_input_embeddings()(chosen[-1])[:, None]
            embeds = torch.cat([embeds, new], 1)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            sizes = torch.cat([sizes, sizes.new_ones(len(mask), 1)], 1)
            positions = torch.cat([positions, positions[:, -1:] + 1], 1)
    return torch.stack(chosen, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", STAGES)
def test_cache_equals_no_cache_equals_recomputing(kind, stage):
    model = pitome_vlm.wrap(tiny_model(kind), keep=0.25, stage=stage)
    batch = tiny_batch(kind)
    prompt = batch["input_ids"].shape[1]
    cached = model.generate(**batch, **GREEDY)
    assert torch.equal(cached[:, :prompt], batch["input_ids"])
    assert torch.equal(cached, model.generate(**batch, **GREEDY, use_cache=False))
    assert torch.equal(cached[:, prompt:], recompute(model, batch, 6))
    static = model.generate(**batch, **GREEDY, cache_implementation="static")
    assert torch.equal(cached, static)


@pytest.mark.parametrize("algorithm", ["pitome", "tome", "random", "pool"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_of_four_is_four_batches_of_one(algorithm, side):
    model = pitome_vlm.wrap(tiny_model(), keep=0.25, algorithm=algorithm)
    batch = tiny_batch(images=(1, 2, 0, 1), texts=(5, 9, 12, 3), side=side)
    together = model(**batch).logits
    if side == "left":
        answers = model.generate(**batch, **GREEDY)[:, batch["input_ids"].shape[1] :]
    pixels = iter(batch["pixel_values"])
    for row, count in enumerate((1, 2, 0, 1)):
        length = int(batch["attention_mask"][row].sum())
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()][None]
        alone = {"input_ids": ids, "attention_mask": torch.ones(1, length, dtype=torch.long)}
        if count:
            alone["pixel_values"] = torch.stack([next(pixels) for _ in range(count)])
        single = model(**alone).logits[0]
        ours = together[row, -len(single) :] if side == "left" else together[row, : len(single)]
        torch.testing.assert_close(ours, single, atol=1e-4, rtol=1e-4)
        if side == "left":
            expected = model.generate(**alone, **GREEDY)[0, length:]
            assert torch.equal(answers[row], expected)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3, "top_k": 5},
        {"do_sample": True, "temperature": 0.7, "return_dict_in_generate": True},
        {"do_sample": False, "return_dict_in_generate": True, "output_scores": True},
        {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
    ],
    ids=str,
)
def test_every_way_to_generate_returns_the_prompt_and_new_tokens(model, options):
    batch = tiny_batch(images=(1, 1))
    torch.manual_seed(0)
    out = model.generate(**batch, max_new_tokens=5, **options)
    torch.manual_seed(0)
    again = model.generate(**batch, max_new_tokens=5, **options)
    sequences = out if isinstance(out, torch.Tensor) else out.sequences
    repeated = again if isinstance(again, torch.Tensor) else again.sequences
    copies, prompt = options.get("num_return_sequences", 1), batch["input_ids"].shape[1]
    assert torch.equal(sequences, repeated)
    assert sequences.shape == (2 * copies, prompt + 5)
    assert torch.equal(sequences[:, :prompt], batch["input_ids"].repeat_interleave(copies, 0))


def test_beams_of_a_batch_equal_beams_of_its_rows(model):
    batch = tiny_batch(images=(1, 2))
    prompt = batch["input_ids"].shape[1]
    together = model.generate(**batch, num_beams=3, max_new_tokens=5)[:, prompt:]
    pixels = batch["pixel_values"].split([1, 2])
    for row in range(2):
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()][None]
        alone = model.generate(
            input_ids=ids, pixel_values=pixels[row], num_beams=3, max_new_tokens=5
        )
        assert torch.equal(alone[0, ids.shape[1] :], together[row])


def test_lengths_count_the_prompt_the_caller_gave(model):
    batch = tiny_batch(images=(1,), texts=(5,))
    prompt = batch["input_ids"].shape[1]
    assert model.generate(**batch, max_length=prompt + 4, do_sample=False).shape[1] == prompt + 4
    model.generation_config.eos_token_id = list(range(1, 128))  # would stop at once
    out = model.generate(**batch, min_length=prompt + 3, max_length=prompt + 9, do_sample=False)
    assert out.shape[1] == prompt + 4
    model.generation_config.eos_token_id = None
    config = model.generation_config.__class__(max_length=prompt + 2, pad_token_id=0)
    assert model.generate(**batch, generation_config=config).shape[1] == prompt + 2


def test_positional_prompt_and_embeddings_only(model):
    batch = tiny_batch(images=(1, 1))
    reference = model.generate(**batch, **GREEDY)
    rest = {k: v for k, v in batch.items() if k != "input_ids"}
    assert torch.equal(model.generate(batch["input_ids"], **rest, **GREEDY), reference)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    from_embeds = model.generate(inputs_embeds=embeds, **rest, **GREEDY)
    assert torch.equal(from_embeds, reference[:, batch["input_ids"].shape[1] :])
    attended = pitome_vlm.compact_inputs(model, **batch)["attention_mask"].bool()
    torch.testing.assert_close(
        model(inputs_embeds=embeds, **rest).logits[attended], model(**batch).logits[attended]
    )


def test_no_image_is_the_unwrapped_model(model):
    batch = tiny_batch(images=(0, 0))
    logits, answer = model(**batch).logits, model.generate(**batch, **GREEDY)
    pitome_vlm.unwrap(model)
    assert torch.equal(model(**batch).logits, logits)
    assert torch.equal(model.generate(**batch, **GREEDY), answer)


def test_images_may_stand_anywhere(model):
    n = PATCHES
    rows = [
        [IMAGE] * n + [1, 5, 6, 7],
        [1, 5] + [IMAGE] * n + [6, 7],
        [1, 5, 6, 7] + [IMAGE] * n,
    ]
    pixels = tiny_batch(images=(3,), texts=(2,))["pixel_values"]
    logits = model(input_ids=torch.tensor(rows), pixel_values=pixels).logits
    assert logits.shape[1] == 4 + 36
    adjacent = [[1] + [IMAGE] * (3 * n) + [5]]
    together = model(input_ids=torch.tensor(adjacent), pixel_values=pixels).logits
    assert together.shape[1] == 2 + 3 * 36
    visual = torch.cat(pitome_vlm.encode_images(model, pixels).features)
    embeds = pitome_vlm.compact_inputs(
        model, input_ids=torch.tensor(adjacent), pixel_values=pixels
    )["inputs_embeds"]
    assert torch.equal(embeds[0, 1:-1], visual)


def test_already_compact_placeholders_are_accepted(model):
    batch = tiny_batch(images=(1,), texts=(4,))
    full = model(**batch).logits
    ids = batch["input_ids"][0]
    short = torch.cat([ids[:4], torch.full((36,), IMAGE), ids[-4:]])[None]
    torch.testing.assert_close(
        model(input_ids=short, pixel_values=batch["pixel_values"]).logits, full
    )


@pytest.mark.parametrize("extra", [1, -1, 144])
def test_placeholders_that_match_nothing_name_both_numbers(model, extra):
    batch = tiny_batch(images=(1,), texts=(4,))
    count = 144 + extra
    ids = torch.tensor([[1] + [IMAGE] * count + [5, 6]])
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=rf"{count} image placeholders for 1 image.*144.*36"):
            call(input_ids=ids, pixel_values=batch["pixel_values"])


def test_a_token_of_the_answer_does_not_look_at_the_tower(model, monkeypatch):
    """Walking its modules takes time, and what they say does not change."""
    looks, look = [], HFLlavaAdapter.tower_shape
    monkeypatch.setattr(
        HFLlavaAdapter, "tower_shape", lambda *a, **k: looks.append(1) or look(*a, **k)
    )
    batch, found = tiny_batch(), []
    for length in (2, 9):
        looks.clear()
        model.generate(**batch, max_new_tokens=length, min_new_tokens=length, do_sample=False)
        found.append(len(looks))
    assert found[0] == found[1]


def test_streamer_gets_every_new_token(model):
    class Words:
        """The part of a tokenizer that TextStreamer uses."""

        def decode(self, ids, **_):
            return "".join(f"w{int(i)} " for i in ids)

    class Collect(TextStreamer):
        def __init__(self):
            super().__init__(Words(), skip_prompt=True)
            self.text = ""

        def on_finalized_text(self, text, stream_end=False):
            self.text += text

    streamer = Collect()
    batch = tiny_batch(images=(1,), texts=(4,))
    out = model.generate(**batch, **GREEDY, streamer=streamer)
    new = out[0, batch["input_ids"].shape[1] :]
    assert streamer.text.split() == [f"w{int(i)}" for i in new]


def turns(model, side="left"):
    """A conversation: a first turn with its cache, and the ids of the second turn."""
    first = tiny_batch(images=(1,), texts=(5,), side=side)
    out = model.generate(**first, **GREEDY, return_dict_in_generate=True)
    more = torch.tensor([[11, 12, 13]])
    return first, out, torch.cat([out.sequences, more], 1)


@pytest.mark.parametrize("with_pixels", [True, False])
def test_a_chat_that_reuses_its_cache_is_right(model, with_pixels):
    first, out, ids = turns(model)
    assert out.past_key_values.get_seq_length() < 60  # 36 visual tokens, not 144
    extra = {"pixel_values": first["pixel_values"]} if with_pixels else {}
    continued = model.generate(
        input_ids=ids, past_key_values=out.past_key_values, **GREEDY, **extra
    )
    fresh = model.generate(input_ids=ids, pixel_values=first["pixel_values"], **GREEDY)
    assert torch.equal(continued, fresh)


def test_a_new_image_needs_its_pixels_even_with_a_cache(model):
    _, out, ids = turns(model)
    ids = torch.cat([ids, torch.full((1, PATCHES), IMAGE), torch.tensor([[5]])], 1)
    with pytest.raises(ValueError, match="an image that the cache does not"):
        model.generate(input_ids=ids, past_key_values=out.past_key_values, **GREEDY)
    partial = torch.cat([ids, torch.full((1, 7), IMAGE)], 1)
    with pytest.raises(ValueError, match="no multiple of the 144"):
        model.generate(input_ids=partial, past_key_values=out.past_key_values, **GREEDY)


def test_forward_refuses_old_placeholders_and_old_masks(model):
    first, _, _ = turns(model)
    cache = DynamicCache()
    out = model(**first, past_key_values=cache, use_cache=True)
    cached = out.past_key_values.get_seq_length()
    with pytest.raises(ValueError, match="pixel_values are missing"):
        model(input_ids=first["input_ids"], past_key_values=out.past_key_values)
    long_mask = torch.ones(1, first["input_ids"].shape[1] + 2, dtype=torch.long)
    with pytest.raises(ValueError, match=rf"cache holds {cached}"):
        model(
            input_ids=torch.tensor([[3, 4]]),
            past_key_values=out.past_key_values,
            attention_mask=long_mask,
        )
    step = model(input_ids=torch.tensor([[3]]), past_key_values=out.past_key_values)
    assert step.logits.shape[1] == 1


def test_a_cache_is_taken_under_either_name(model):
    first, out, ids = turns(model)
    cache = out.get(CACHE_NAME)
    expected = model.generate(input_ids=ids, pixel_values=first["pixel_values"], **GREEDY)
    for name in ("cache", "past_key_values"):
        again = copy.deepcopy(cache)
        assert torch.equal(model.generate(input_ids=ids, **{name: again}, **GREEDY), expected)
        step = model(input_ids=torch.tensor([[3]]), **{name: again})
        assert step.logits.shape[1] == 1
    other = {"cache", "past_key_values"} - {CACHE_NAME}
    both = {CACHE_NAME: copy.deepcopy(cache), other.pop(): DynamicCache()}
    # As transformers does, and PEFT's prefix tuning asks for.
    step = model(input_ids=torch.tensor([[3]]), **both)
    assert step[CACHE_NAME].get_seq_length() == cache.get_seq_length() + 1


def test_output_carries_the_merged_image_states(model):
    batch = tiny_batch()
    output = model(**batch)
    newer = hasattr(output, "image_outputs")  # transformers 5.24: one tensor for every image
    states = torch.cat(output.image_outputs.pooler_output) if newer else output.image_hidden_states
    expected = torch.cat(pitome_vlm.encode_images(model, batch["pixel_values"]).features)
    assert torch.equal(states, expected)
    as_tuple = model(**batch, return_dict=False)
    assert torch.equal(as_tuple[0], model(**batch).logits)


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_and_positions_move_with_their_tokens(side):
    model = pitome_vlm.wrap(tiny_model(), keep=0.25, positions="compact")
    batch = tiny_batch(side=side)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    labels = ids.masked_fill((ids == IMAGE) | (mask == 0), -100)
    compact = pitome_vlm.compact_inputs(model, **batch, labels=labels)
    for row in range(2):
        kept = compact["labels"][row]
        assert kept[kept != -100].tolist() == labels[row][labels[row] != -100].tolist()
        assert compact["attention_mask"][row].sum() == mask[row].sum() - (row + 1) * (144 - 36)
    loss = model(**batch, labels=labels).loss
    torch.testing.assert_close(loss, model(**compact).loss)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    moved = pitome_vlm.compact_inputs(model, **batch, position_ids=positions)["position_ids"]
    expected = (compact["attention_mask"].cumsum(1) - 1).clamp(min=0)
    attended = compact["attention_mask"].bool()
    assert torch.equal(moved[attended], expected[attended])


def test_rows_that_become_ragged_without_a_mask_get_one(model):
    n = PATCHES
    ids = torch.full((2, 2 * n + 4), 7)
    ids[0, 1 : 1 + 2 * n] = IMAGE
    ids[1, 2 : 2 + n] = IMAGE
    pixels = torch.randn(3, 3, 96, 96)
    compact = pitome_vlm.compact_inputs(model, input_ids=ids, pixel_values=pixels)
    assert compact["attention_mask"].sum(1).tolist() == [4 + 72, 4 + n + 36]
    answers = model.generate(input_ids=ids, pixel_values=pixels, **GREEDY)
    alone = model.generate(input_ids=ids[:1], pixel_values=pixels[:2], **GREEDY)
    assert torch.equal(answers[0], alone[0])


def test_what_cannot_be_shortened_is_refused(model):
    batch = tiny_batch()
    four_axes = torch.ones(2, 1, 304, 304, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"attention_mask must be \[batch, tokens\].*4 axes"):
        model(**batch | {"attention_mask": four_axes})
    with pytest.raises(ValueError, match="logits_to_keep must be a number"):
        model(**batch, logits_to_keep=torch.tensor([0, 5]))
    assert model(**batch, logits_to_keep=1).logits.shape[1] == 1


def test_packed_samples_keep_their_own_positions():
    model = pitome_vlm.wrap(tiny_model(), keep=0.25, positions="compact")
    n = PATCHES
    one = [1] + [IMAGE] * n + [5, 6]
    ids = torch.tensor([one + one])
    positions = torch.tensor([list(range(len(one))) * 2])
    pixels = torch.randn(2, 3, 96, 96)
    moved = pitome_vlm.compact_inputs(
        model, input_ids=ids, pixel_values=pixels, position_ids=positions
    )["position_ids"]
    assert moved.tolist() == [list(range(1 + 36 + 2)) * 2]
