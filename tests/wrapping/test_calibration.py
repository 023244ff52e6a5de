"""What the language model is told about merged tokens: their weight and their place."""

from __future__ import annotations

import pytest
import torch
from families import IMAGE_FAMILIES
from tiny import IMAGE, PATCHES, tiny_batch, tiny_model
from transformers.cache_utils import DynamicCache

import pitome_vlm
from pitome_vlm.adapters import find_adapter
from pitome_vlm.merge import algorithms, registry
from pitome_vlm.merge.algorithm import Algorithm

GREEDY = {"max_new_tokens": 6, "do_sample": False}
FIRST = 1  # column of the first placeholder in the prompts built here


def expected_layout(model, batch, mode="mean"):
    """Positions and sizes of every attended column, one row after the other, by plain loops."""
    visual = pitome_vlm.encode_images(model, batch["pixel_values"])
    images = iter(zip(visual.source_maps, visual.anchors, visual.counts, strict=True))
    rows = []
    for ids, mask in zip(
        batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True
    ):
        place, column, row = 0, 0, []
        while column < len(ids):
            if not mask[column]:
                column += 1
                continue
            if ids[column] != IMAGE:
                row.append((float(place), 1.0))
                place, column = place + 1, column + 1
                continue
            source, anchors, count = next(images)
            for token in range(count):
                patches = [i for i, group in enumerate(source.tolist()) if group == token]
                middle = {
                    "mean": sum(patches) / len(patches),
                    "median": patches[(len(patches) - 1) // 2],
                    "original": int(anchors[token]),
                }[mode]
                row.append((place + middle, float(len(patches))))
            place, column = place + len(source), column + len(source)
        rows.append(row)
    return rows


@pytest.mark.parametrize("mode", ["mean", "median", "original"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("algorithm", ["pitome", "random", "pool"])
def test_every_column_has_its_place_and_its_weight(algorithm, side, mode):
    model = pitome_vlm.wrap(tiny_model(), keep=0.25, algorithm=algorithm, positions=mode)
    batch = tiny_batch(images=(1, 2, 0), texts=(5, 9, 12), side=side)
    compact = pitome_vlm.compact_inputs(model, **batch)
    for row, expected in enumerate(expected_layout(model, batch, mode)):
        attended = compact["attention_mask"][row].bool()
        positions = compact["position_ids"][row][attended].tolist()
        sizes = compact["token_sizes"][row][attended].tolist()
        assert positions == pytest.approx([place for place, _ in expected], abs=1e-3)
        assert sizes == [size for _, size in expected]


def test_an_anchor_belongs_to_its_group():
    for algorithm in ("pitome", "tome", "random", "pool"):
        model = pitome_vlm.wrap(tiny_model(), tokens=17, algorithm=algorithm)
        visual = pitome_vlm.encode_images(model, torch.randn(3, 3, 96, 96))
        for source, anchors in zip(visual.source_maps, visual.anchors, strict=True):
            assert source[anchors].tolist() == list(range(17))


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
def test_the_bias_is_worth_as_many_equal_tokens(implementation):
    """softmax(s + log n) is n equal keys: the answer sees merged duplicates as it saw all of them.

    Exact where no duplicate sees more than another: with one layer (keys come from embeddings
    alone), for duplicates that share one position.
    """
    model = tiny_model(text_layers=1)
    model.set_attn_implementation(implementation)
    # Flex attention uncompiled: its kernel for CPUs crashes the process in torch 2.13.
    with torch.compiler.set_stance("force_eager"):
        merged, whole = merged_and_repeated(model)
    torch.testing.assert_close(merged, whole, atol=2e-5, rtol=1e-4)


def merged_and_repeated(model):
    """Last logits [1, 2, V] of a prompt with sizes, and of one with every token as often."""
    torch.manual_seed(0)
    width = model.config.text_config.hidden_size
    text, unique = torch.randn(1, 4, width), torch.randn(1, 5, width)
    copies = torch.tensor([3, 1, 6, 2, 1])
    repeated = unique.repeat_interleave(copies, 1)
    places = torch.tensor([4.0, 7.5, 9.0, 13.0, 17.0])
    after = torch.tensor([20.0, 21.0])
    with torch.no_grad():
        whole = model(
            inputs_embeds=torch.cat([text[:, :2], repeated, text[:, 2:]], 1),
            attention_mask=torch.ones(1, 4 + 13),
            position_ids=torch.cat([torch.arange(2.0), places.repeat_interleave(copies), after])[
                None
            ],
        ).logits[:, -2:]
        pitome_vlm.wrap(model, keep=0.25)
        merged = model(
            inputs_embeds=torch.cat([text[:, :2], unique, text[:, 2:]], 1),
            attention_mask=torch.ones(1, 4 + 5),
            position_ids=torch.cat([torch.arange(2.0), places, after])[None],
            token_sizes=torch.cat([torch.ones(2), copies.float(), torch.ones(2)])[None],
        ).logits[:, -2:]
    return merged, whole


def test_an_image_of_one_patch_repeated_is_one_token():
    """At any depth where nothing stands before the image: all its tokens are then the same."""
    model = tiny_model()
    torch.manual_seed(0)
    width = model.config.text_config.hidden_size
    patch, text = torch.randn(1, 1, width), torch.randn(1, 3, width)
    positions = torch.tensor([[4.0, 9.0, 10.0, 11.0]])
    with torch.no_grad():
        whole = model(
            inputs_embeds=torch.cat([patch.expand(-1, 9, -1), text], 1),
            attention_mask=torch.ones(1, 12),
            position_ids=torch.cat([torch.full((1, 9), 4.0), positions[:, 1:]], 1),
        ).logits[:, -3:]
        pitome_vlm.wrap(model, keep=0.25)
        merged = model(
            inputs_embeds=torch.cat([patch, text], 1),
            attention_mask=torch.ones(1, 4),
            position_ids=positions,
            token_sizes=torch.tensor([[9.0, 1, 1, 1]]),
        ).logits[:, -3:]
    torch.testing.assert_close(merged, whole, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_eager_and_sdpa_agree(side):
    batch = tiny_batch(images=(1, 2), texts=(5, 9), side=side)
    attended, logits = None, []
    for implementation in ("eager", "sdpa"):
        model = tiny_model()
        model.set_attn_implementation(implementation)
        pitome_vlm.wrap(model, keep=0.25)
        attended = pitome_vlm.compact_inputs(model, **batch)["attention_mask"].bool()
        with torch.no_grad():
            logits.append(model(**batch).logits[attended])
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 3}])
def test_generate_is_the_forward_pass_step_by_step(options):
    """Manual decoding on the cache that `forward` filled, without telling it anything again."""
    model = pitome_vlm.wrap(tiny_model(), keep=0.25)
    batch = tiny_batch(images=(1, 2), texts=(5, 9))
    answers = model.generate(**batch, **GREEDY, **options)[:, batch["input_ids"].shape[1] :]
    if "num_beams" in options:
        alone = [
            model.generate(**tiny_row(batch, row), **GREEDY, **options)[:, -answers.shape[1] :]
            for row in range(2)
        ]
        assert torch.equal(answers, torch.cat(alone))
        return
    with torch.no_grad():
        out = model(**batch, use_cache=True)
        mask = pitome_vlm.compact_inputs(model, **batch)["attention_mask"]
        steps = [out.logits[:, -1].argmax(-1)]
        for _ in range(5):
            mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
            out = model(
                input_ids=steps[-1][:, None],
                attention_mask=mask,
                past_key_values=out.past_key_values,
            )
            steps.append(out.logits[:, -1].argmax(-1))
    assert torch.equal(answers, torch.stack(steps, 1))


def tiny_row(batch, row):
    """One row of a batch with one and two images, unpadded."""
    keep = batch["attention_mask"][row].bool()
    first = [0, 1][row]
    return {
        "input_ids": batch["input_ids"][row : row + 1, keep],
        "attention_mask": batch["attention_mask"][row : row + 1, keep],
        "pixel_values": batch["pixel_values"][first : first + 1 + row],
    }


def test_a_later_turn_knows_the_images_of_the_first():
    model = pitome_vlm.wrap(tiny_model(), keep=0.25)
    first = tiny_batch(images=(1,), texts=(5,))
    cache = DynamicCache(config=model.config.text_config)
    turn = model.generate(**first, **GREEDY, past_key_values=cache)
    later = torch.cat([turn, torch.tensor([[7, 8, 9]])], 1)
    pixels = first["pixel_values"]
    fresh = model.generate(input_ids=later, pixel_values=pixels, **GREEDY)
    assert torch.equal(model.generate(input_ids=later, past_key_values=cache, **GREEDY), fresh)
    again = model.generate(**first, **GREEDY, return_dict_in_generate=True).past_key_values
    with (
        pitome_vlm.wrapped(model, keep=0.25, size_bias=False),
        pytest.raises(
            ValueError, match=r"computed with log-size bias, mean positions.*start a new cache"
        ),
    ):
        model.generate(input_ids=later, past_key_values=again, **GREEDY)


def test_text_keeps_the_place_it_would_have_without_merging():
    model = tiny_model()
    batch = tiny_batch(images=(2,), texts=(6,))
    untouched = model(**batch).logits[:, -1]
    pitome_vlm.wrap(model, tokens=PATCHES - 1)
    compact = pitome_vlm.compact_inputs(model, **batch)
    assert compact["position_ids"][0, -1] == batch["input_ids"].shape[1] - 1
    assert compact["token_sizes"].sum() == batch["input_ids"].shape[1]
    pitome_vlm.wrap(model, keep=1.0)
    assert torch.equal(model(**batch).logits[:, -1], untouched)


def grown(batch, new):
    """A batch with further tokens [B, n] after its prompt."""
    more = {"input_ids": new, "attention_mask": torch.ones_like(new)}
    return batch | {
        name: torch.cat([value, more.get(name, torch.zeros_like(new)).to(value)], 1)
        for name, value in batch.items()
        if value.shape == batch["input_ids"].shape
    }


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
@torch.no_grad()
def test_what_follows_an_image_is_placed_after_all_of_it(family):
    model, batch = family(texts=(0, 0))
    ids = batch["input_ids"]
    token = find_adapter(model).placeholder_ids(model)["image"]
    end = int((ids == token).nonzero()[:, 1].max()) + 1
    # The processor's prompt, cut after its image.
    batch = {n: v[:, :end] if v.shape == ids.shape else v for n, v in batch.items()}
    pitome_vlm.wrap(model, keep=0.25)
    answer = model.generate(**batch, max_new_tokens=3, do_sample=False)[:, -3:]
    for step in (1, 2):
        logits = model(**grown(batch, answer[:, :step])).logits[:, -1]
        assert torch.equal(logits.argmax(-1), answer[:, step])


def test_gradients_are_those_of_eager_attention():
    """torch's CPU kernel has wrong gradients for queries that see nothing."""
    gradients = []
    for implementation in ("eager", "sdpa"):
        model = tiny_model()
        model.set_attn_implementation(implementation)
        pitome_vlm.wrap(model, keep=0.25).train()
        batch = tiny_batch(images=(1, 2), texts=(5, 9))
        labels = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, -100)
        model(**batch, labels=labels).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-3, rtol=1e-2)


def test_one_option_alone_takes_the_other_along():
    model = tiny_model()
    for options, expected in (
        ({}, "log-size bias, mean positions"),
        ({"size_bias": False}, "no size bias, compact positions"),
        ({"positions": "compact"}, "no size bias, compact positions"),
        ({"positions": "original"}, "log-size bias, original positions"),
        ({"size_bias": True, "positions": "compact"}, "log-size bias, compact positions"),
    ):
        pitome_vlm.wrap(model, keep=0.25, **options)
        assert expected in str(pitome_vlm.describe(model))


def test_an_algorithm_may_be_better_without():
    def nearest(keys, n_out, *, ctx):
        return algorithms.get("random").plan(keys, n_out, ctx=ctx)

    name = "uncalibrated_for_a_test"
    algorithms.register(
        Algorithm(
            name, nearest, "tests", pairwise=False, default_stage="projector", calibrated=False
        )
    )
    try:
        model = pitome_vlm.wrap(tiny_model(), keep=0.25, algorithm=name)
        assert "no size bias" in str(pitome_vlm.describe(model))
    finally:
        registry._known.pop(name)


def test_packed_samples_do_not_see_each_other():
    model = pitome_vlm.wrap(tiny_model(), keep=0.25)
    one = [1] * FIRST + [IMAGE] * PATCHES + [5, 6]
    positions = torch.tensor([list(range(len(one))) * 2])
    pixels = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        packed = model(
            input_ids=torch.tensor([one + one]), pixel_values=pixels, position_ids=positions
        ).logits
        second = model(input_ids=torch.tensor([one]), pixel_values=pixels[1:]).logits
    torch.testing.assert_close(packed[:, -second.shape[1] :], second, atol=1e-4, rtol=1e-3)
