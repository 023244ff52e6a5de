"""The original llava package: forward and generate with merged tokens, as its users call them."""

from __future__ import annotations

import inspect
import logging

import pytest
import torch
import torch.nn.functional as F
import transformers
from original_llava import (
    IMAGE,
    KINDS,
    PACKAGE,
    PATCHES,
    ROTARY,
    original_batch,
    original_model,
)
from test_original_exactness import own_preparation, spatial_batch, spatial_model
from transformers import StoppingCriteria, StoppingCriteriaList

import pitome_vlm
from pitome_vlm.releases import CACHE_NAME

GREEDY = {"max_new_tokens": 5, "do_sample": False}
RELEASE = tuple(map(int, transformers.__version__.split(".")[:2]))
# `forward` of llava-torch 1.2.2.post1 does not know what generate of other releases passes.
RUNS_ITSELF = not PACKAGE or (5, 0) <= RELEASE < (5, 24)
CALIBRATED = {"size_bias": True, "positions": "mean"}
PLAIN = {"size_bias": False, "positions": "compact"}


def recomputed(model, batch, steps=5):
    """Greedy tokens, everything computed anew for every one of them, one row after the other."""
    rows, first = [], 0
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        ids = ids[mask.bool()][None]
        taken = max(1, int((ids == IMAGE).sum()))
        part = {"images": batch["images"][first : first + taken]}
        if "image_sizes" in batch:
            part["image_sizes"] = batch["image_sizes"][first : first + taken]
        first, new = first + taken, []
        for _ in range(steps):
            whole = torch.cat([ids, torch.tensor(new, dtype=torch.long)[None]], 1)
            new.append(int(model(input_ids=whole, **part).logits[0, -1].argmax()))
        rows.append(new)
    return torch.tensor(rows)


@pytest.mark.parametrize("kind", KINDS)
def test_keep_one_generates_as_the_unwrapped_model(kind):
    model, batch = original_model(kind, tokenizer_padding_side="left"), original_batch()
    expected = recomputed(model, batch)
    if RUNS_ITSELF:
        assert torch.equal(model.generate(batch["input_ids"], **rest(batch), **GREEDY), expected)
        beams = model.generate(batch["input_ids"], **rest(batch), num_beams=3, max_new_tokens=4)
    else:
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            model.generate(batch["input_ids"], **rest(batch), **GREEDY)
    pitome_vlm.wrap(model, keep=1.0)
    assert torch.equal(model.generate(batch["input_ids"], **rest(batch), **GREEDY), expected)
    found = model.generate(batch["input_ids"], **rest(batch), num_beams=3, max_new_tokens=4)
    assert not RUNS_ITSELF or torch.equal(found, beams)


def rest(batch):
    return {name: value for name, value in batch.items() if name != "input_ids"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", ["tower", "projector", "both"])
@pytest.mark.parametrize("options", [CALIBRATED, PLAIN])
def test_cached_greedy_equals_recomputing(kind, stage, options):
    if kind not in ROTARY:
        options = PLAIN
    model = pitome_vlm.wrap(original_model(kind), keep=0.25, stage=stage, **options)
    batch = original_batch(images=(1, 2, 1), texts=(5, 9, 7), side="left")
    expected = recomputed(model, batch)
    assert len({tuple(row) for row in expected.tolist()}) > 1
    assert torch.equal(model.generate(batch["input_ids"], **rest(batch), **GREEDY), expected)
    without = model.generate(batch["input_ids"], **rest(batch), **GREEDY, use_cache=False)
    assert torch.equal(without, expected)


@pytest.mark.parametrize("options", [CALIBRATED, PLAIN])
def test_cached_greedy_equals_recomputing_with_tiles(options):
    model = pitome_vlm.wrap(spatial_model(), keep=0.25, **options)
    batch = spatial_batch([(640, 480), (1000, 30)], (4, 7))
    expected = recomputed(model, batch)
    assert torch.equal(model.generate(batch["input_ids"], **rest(batch), **GREEDY), expected)


@pytest.mark.parametrize("kind", ROTARY)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("images", [(1, 2, 0), (2, 1, 1)])
def test_a_batch_is_its_rows(kind, side, images):
    model = original_model(kind, tokenizer_padding_side=side)
    pitome_vlm.wrap(model, keep=0.25)
    batch = original_batch(images=images, texts=(5, 9, 12), side=side)
    labels = batch["input_ids"].masked_fill(batch["input_ids"] < 30, -100)
    together = model(**batch, labels=labels).logits
    shown = pitome_vlm.compact_inputs(model, **batch)["attention_mask"].bool()
    first = 0
    for row, count in enumerate(images):
        here = batch["attention_mask"][row].bool()
        own = batch["images"][first : first + max(1, count)]
        first += max(1, count)
        alone = model(input_ids=batch["input_ids"][row, here][None], images=own).logits
        torch.testing.assert_close(together[row, shown[row]], alone[0], atol=2e-3, rtol=1e-3)


def test_answers_depend_on_words_pixels_and_merging():
    """The equalities of these tests would mean little on a model that always says the same."""
    model, first, second = original_model(), original_batch(seed=1), original_batch(seed=2)
    others = first | {"images": second["images"]}
    with pitome_vlm.wrapped(model, keep=1.0):
        found = [model.generate(b["input_ids"], **rest(b), **GREEDY) for b in (first, second)]
        found.append(model.generate(others["input_ids"], **rest(others), **GREEDY))
    with pitome_vlm.wrapped(model, keep=0.25):
        found.append(model.generate(first["input_ids"], **rest(first), **GREEDY))
    rows = [tuple(row) for answer in found for row in answer.tolist()]
    assert len(set(rows)) == len(rows)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_is_over_text_only(side):
    model = original_model(tokenizer_padding_side=side)
    pitome_vlm.wrap(model, keep=0.25)
    batch = original_batch(images=(1, 2), texts=(5, 9), side=side)
    labels = batch["input_ids"].clone()
    labels[(labels == IMAGE) | (batch["attention_mask"] == 0)] = -100
    out = model(**batch, labels=labels)
    compact = pitome_vlm.compact_inputs(model, **batch, labels=labels)
    assert out.logits.shape[:2] == compact["labels"].shape
    kept = [row[row >= 0].tolist() for row in compact["labels"]]
    assert kept == [row[row >= 0].tolist() for row in labels]
    mean = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), compact["labels"][:, 1:].flatten())
    torch.testing.assert_close(out.loss, mean)


@pytest.mark.parametrize("options", [CALIBRATED, PLAIN])
def test_compact_inputs_are_what_forward_makes(options):
    model = pitome_vlm.wrap(original_model(), keep=0.25, **options)
    batch = original_batch()
    compact = pitome_vlm.compact_inputs(model, **batch)
    assert not {"input_ids", "images", "image_sizes"} & compact.keys()
    torch.testing.assert_close(model(**compact).logits, model(**batch).logits)
    text = {"input_ids": batch["input_ids"][:, :3]}
    assert pitome_vlm.compact_inputs(model, **text) == text


def test_calibration_reaches_the_language_model():
    model, batch = original_model(), original_batch()
    found = {}
    for bias in (True, False):
        for positions in ("mean", "original", "compact"):
            with pitome_vlm.wrapped(model, keep=0.1, size_bias=bias, positions=positions):
                found[bias, positions] = model(**batch).logits
    keys = list(found)
    for i, one in enumerate(keys):
        for other in keys[i + 1 :]:
            assert (found[one] - found[other]).abs().max() > 1e-3, (one, other)


def test_size_bias_is_worth_as_many_equal_tokens():
    """One layer: n equal patches at one place answer as one token of size n."""
    model = original_model(num_hidden_layers=1)
    torch.manual_seed(0)
    patch, text = torch.randn(1, 1, 32), torch.randn(1, 3, 32)
    with torch.no_grad():
        whole = model(
            inputs_embeds=torch.cat([patch.expand(-1, 9, -1), text], 1),
            attention_mask=torch.ones(1, 12),
            position_ids=torch.tensor([[4.0] * 9 + [9.0, 10.0, 11.0]]),
        ).logits[:, -3:]
        pitome_vlm.wrap(model, keep=0.25)
        merged = model(
            inputs_embeds=torch.cat([patch, text], 1),
            attention_mask=torch.ones(1, 4),
            position_ids=torch.tensor([[4.0, 9.0, 10.0, 11.0]]),
            token_sizes=torch.tensor([[9.0, 1, 1, 1]]),
        ).logits[:, -3:]
    torch.testing.assert_close(merged, whole, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [CALIBRATED, PLAIN])
def test_decoding_by_hand_with_the_returned_cache(options):
    model = pitome_vlm.wrap(original_model(), keep=0.25, **options)
    batch = original_batch(images=(1,), texts=(6,))
    expected = recomputed(model, batch, steps=4)[0].tolist()
    out = model(**batch, use_cache=True)
    found = []
    for _ in range(4):
        found.append(int(out.logits[0, -1].argmax()))
        # Old decoding loops pass the images again with every token; they are ignored.
        cache = {"past_key_values": out.get(CACHE_NAME)}
        step = torch.tensor([[found[-1]]])
        out = model(input_ids=step, images=batch["images"], use_cache=True, **cache)
    assert found == expected


def test_an_image_after_a_filled_cache():
    model = pitome_vlm.wrap(original_model(), keep=0.25)
    first, second = original_batch((1,), (5,)), original_batch((1,), (4,), seed=3)
    both = {
        "input_ids": torch.cat([first["input_ids"], second["input_ids"]], 1),
        "images": torch.cat([first["images"], second["images"]]),
    }
    fresh = model(**both).logits
    for mask in (None, "new", "all"):
        cache = model(**first, use_cache=True).get(CACHE_NAME)
        length, n = cache.get_seq_length(), second["input_ids"].shape[1]
        masks = {None: None, "new": torch.ones(1, n), "all": torch.ones(1, length + n)}
        given = second | {"attention_mask": masks[mask]}
        later = model(**given, past_key_values=cache).logits
        torch.testing.assert_close(later, fresh[:, length:], atol=1e-3, rtol=1e-3)
    cache = model(**first, use_cache=True).get(CACHE_NAME)
    pitome_vlm.wrap(model, keep=0.5)
    with pytest.raises(ValueError, match=r"36 visual tokens.*makes 72"):
        model(**second, past_key_values=cache)


def test_generate_on_a_filled_cache_equals_a_fresh_one():
    model = pitome_vlm.wrap(original_model(), keep=0.25)
    batch = original_batch((1,), (5,))
    cache = model(**batch, use_cache=True).get(CACHE_NAME)
    more = torch.cat([batch["input_ids"], torch.tensor([[11, 12, 13]])], 1)
    call = {"images": batch["images"], **GREEDY}
    if not (5, 0) <= RELEASE < (5, 24):
        with pytest.raises(ValueError, match="cannot continue a filled"):
            model.generate(more, past_key_values=cache, **call)
        return
    continued = model.generate(more, past_key_values=cache, **call)
    assert torch.equal(continued, model.generate(more, **call))


@pytest.mark.parametrize("kind", KINDS)
def test_text_only(kind):
    model = original_model(kind)
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    logits = model(input_ids=ids).logits
    pitome_vlm.wrap(model, keep=0.25)
    assert torch.equal(model(input_ids=ids).logits, logits)
    new = model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
    assert new.shape == (2, 5)
    assert int(new[0, 0]) == int(logits[0, -1].argmax())


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "do_sample": False},
        {"do_sample": True, "top_k": 5},
        {"num_beams": 2, "num_return_sequences": 2},
        {"return_dict_in_generate": True, "output_scores": True, "do_sample": False},
        {"cache_implementation": "static", "do_sample": False},
    ],
)
def test_every_way_to_generate(options):
    model = pitome_vlm.wrap(original_model(), keep=0.25)
    batch = original_batch()
    out = model.generate(batch["input_ids"], **rest(batch), max_new_tokens=4, **options)
    sequences = out if isinstance(out, torch.Tensor) else out.sequences
    assert sequences.shape == (2 * options.get("num_return_sequences", 1), 4)
    if options.get("do_sample") is False and "num_beams" not in options:
        assert torch.equal(sequences, recomputed(model, batch, steps=4))


def test_beams_of_a_batch_are_beams_of_its_rows():
    model = pitome_vlm.wrap(original_model(), keep=0.25)
    batch = original_batch((1, 1), (5, 9))
    beams = {"num_beams": 3, "max_new_tokens": 4}
    together = model.generate(batch["input_ids"], **rest(batch), **beams)
    for row in range(2):
        here = batch["attention_mask"][row].bool()
        ids = batch["input_ids"][row, here][None]
        alone = model.generate(ids, images=batch["images"][row : row + 1], **beams)
        assert torch.equal(together[row : row + 1], alone)


def test_lengths_count_the_unmerged_prompt():
    """As without merging: max_length counts every patch of the prompt."""
    batch = original_batch((1,), (5,))
    full = batch["input_ids"].shape[1] - 1 + PATCHES
    for keep in (1.0, 0.25):
        model = pitome_vlm.wrap(original_model(), keep=keep)
        new = model.generate(
            batch["input_ids"], **rest(batch), max_length=full + 3, do_sample=False
        )
        assert new.shape == (1, 3)
    with pytest.raises(ValueError, match=rf"max_length is 20, but the prompt alone has {full}"):
        model.generate(batch["input_ids"], **rest(batch), max_length=20)


def test_criteria_and_streamers_see_new_tokens():
    seen, streamed = [], []

    class Watch(StoppingCriteria):
        def __call__(self, ids, scores, **kwargs):
            seen.append(ids.shape[1])
            return torch.full((len(ids),), len(seen) == 3)

    class Stream:
        def put(self, value):
            streamed.append(value)

        def end(self):
            streamed.append(None)

    model = pitome_vlm.wrap(original_model(), keep=0.25)
    batch = original_batch((1,), (5,))
    criteria = StoppingCriteriaList([Watch()])
    new = model.generate(
        batch["input_ids"], **rest(batch), **GREEDY, stopping_criteria=criteria, streamer=Stream()
    )
    assert new.shape == (1, 3)
    assert seen == [1, 2, 3]
    assert streamed[-1] is None
    assert [int(one) for one in streamed[-4:-1]] == new[0].tolist()


def test_images_as_a_list_and_in_five_axes():
    model = pitome_vlm.wrap(original_model(), keep=0.25)
    batch = original_batch((1, 1), (5, 5))
    expected = model(**batch).logits
    listed = model(**batch | {"images": list(batch["images"])}).logits
    five = model(**batch | {"images": batch["images"][:, None]}).logits
    assert torch.equal(listed, expected)
    assert torch.equal(five, expected)
    # Tiles without a layout of their own follow each other; each is merged on its own.
    tiles = model(**batch | {"images": torch.randn(2, 3, 3, 96, 96)}).logits
    assert tiles.shape[1] == expected.shape[1] + 2 * 36


def test_a_prompt_is_cut_after_merging():
    batch = original_batch((2,), (30,))
    limit = 2 * 36 + 20
    model = original_model(tokenizer_model_max_length=limit)
    pitome_vlm.wrap(model, keep=0.25)
    compact = pitome_vlm.compact_inputs(model, **batch, labels=batch["input_ids"])
    assert compact["inputs_embeds"].shape[1] == limit
    words = batch["input_ids"][batch["input_ids"] >= 0]
    assert compact["labels"][compact["labels"] >= 0].tolist() == words[:20].tolist()
    # Without merging the image alone is longer than that.
    _, embeds, _, _ = own_preparation(pitome_vlm.unwrap(model), batch)
    assert embeds.shape[1] == limit < 2 * PATCHES


def test_rows_that_become_ragged_get_a_mask():
    model = pitome_vlm.wrap(original_model(), keep=0.25)
    # 1 image and 145 words more are as long as 2 images, until these are merged.
    batch = original_batch((2, 1), (5, 5 + PATCHES + 4 - 3 - 1 + 1))
    ids = batch["input_ids"]
    new = model.generate(ids, images=batch["images"], attention_mask=None, **GREEDY)
    batch["attention_mask"] = (torch.arange(ids.shape[1]) < ids.shape[1]).expand_as(ids).long()
    assert torch.equal(new, recomputed(model, batch))


def test_the_preparation_called_directly_says_what_it_leaves_out(caplog):
    model, batch = original_model(), original_batch()
    pitome_vlm.wrap(model, keep=0.25)
    # Once per message and process.
    transformers.utils.logging.get_logger("x").warning_once.__func__.cache_clear()
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        mask, embeds, _, place = own_preparation(model, batch)
    assert any("cannot carry sizes" in record.message for record in caplog.records)
    assert place is None
    assert embeds.shape[1] == int(mask.sum(1).max()) == 72 + 3 * 2 + 1 + 9
    whole = model.prepare_inputs_labels_for_multimodal(
        batch["input_ids"], torch.arange(3), batch["attention_mask"], None, None, batch["images"]
    )
    assert whole[1].shape == embeds.shape[:2]


def test_signatures_are_the_model_s_own():
    plain, model = original_model(), pitome_vlm.wrap(original_model(), keep=0.25)
    for name in ("generate", "prepare_inputs_labels_for_multimodal"):
        own = inspect.signature(getattr(plain, name))
        assert inspect.signature(getattr(model, name)) == own
    names = list(inspect.signature(model.forward).parameters)
    assert [n for n in names if n != "token_sizes"] == list(
        inspect.signature(plain.forward).parameters
    )


@pytest.mark.parametrize("keep", [0.25, 1.0])
def test_arguments_that_the_package_does_not_know(keep):
    """Newer releases pass a cache of another name, older ones cache_position; neither arrives."""
    model = original_model("llama" if PACKAGE else "strict", tokenizer_padding_side="left")
    pitome_vlm.wrap(model, keep=keep)
    batch = original_batch(side="left")
    new = model.generate(batch["input_ids"], **rest(batch), **GREEDY)
    assert torch.equal(new, recomputed(model, batch))
    ids = batch["input_ids"].clamp(min=3)
    assert model.generate(ids, **GREEDY).shape == (2, 5)
