"""keep="auto": every image at the count its own redundancy allows."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny import PATCHES, tiny_batch, tiny_model
from transformers.cache_utils import DynamicCache

import pitome_vlm
from pitome_vlm import MergeConfig
from pitome_vlm.merge import algorithms
from pitome_vlm.merge.adaptive import adapt
from pitome_vlm.merge.algorithm import MergeContext
from pitome_vlm.wrapping.encode import visual_token_counts
from pitome_vlm.wrapping.wrap import schedule_of

GREEDY = {"max_new_tokens": 6, "do_sample": False}
COUNTS = (24, 18, 12, 8, 4)


def three_images(seed=0, redundant=4):
    """Features of three images: all alike, a few clusters, nothing alike."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(redundant, 16, generator=generator)
    clusters = centres[torch.randint(0, redundant, (24,), generator=generator)]
    clusters = clusters + 0.01 * torch.randn(24, 16, generator=generator)
    return torch.stack([torch.ones(24, 16), clusters, torch.randn(24, 16, generator=generator)])


def run(features, quality, **options):
    config = MergeConfig(keep="auto", **options)
    return adapt(
        features,
        None,
        COUNTS,
        quality,
        algorithm=algorithms.get(config.algorithm),
        ctx=MergeContext(config=config),
    )


def explained(features, result):
    """Share of variance of directions that is left, by plain loops."""
    unit = [row / row.norm() for row in features.double()]
    middle = features.double().mean(0)
    middle = middle / middle.norm()
    centres = [row / row.norm() for row in result.features.double()]
    lost = sum(
        float(((u - centres[g]) ** 2).sum()) for u, g in zip(unit, result.assign, strict=True)
    )
    whole = sum(float(((u - middle) ** 2).sum()) for u in unit)
    return 1 - lost / whole


def test_redundant_images_end_with_fewer_tokens():
    alike, clusters, different = (len(one.features) for one in run(three_images(), 0.95))
    assert alike == 4
    assert clusters <= 8
    assert different > clusters


@pytest.mark.parametrize("algorithm", ["pitome_plus", "pitome", "tome", "random", "tofu"])
def test_what_is_left_is_what_was_asked_for(algorithm):
    features = three_images(1)
    for quality in (0.5, 0.8, 0.95, 1.0):
        for one, own in zip(run(features, quality, algorithm=algorithm), features, strict=True):
            assert len(one.features) in COUNTS
            assert one.explained >= quality or len(one.features) == COUNTS[0]
            assert one.assign[one.kept].tolist() == list(range(len(one.features)))
            if not torch.equal(own, torch.ones_like(own)):
                assert one.explained == pytest.approx(explained(own, one), abs=1e-4)


def test_more_quality_never_means_fewer_tokens():
    features = three_images(2)
    sizes = [[len(one.features) for one in run(features, q)] for q in (0.3, 0.6, 0.9, 0.99)]
    for lower, higher in itertools.pairwise(sizes):
        assert all(a <= b for a, b in zip(lower, higher, strict=True))


def test_an_image_does_not_depend_on_its_batch():
    features = three_images(3)
    together = run(features, 0.9)
    for index, one in enumerate(together):
        (alone,) = run(features[index : index + 1], 0.9)
        assert torch.equal(alone.assign, one.assign)
        torch.testing.assert_close(alone.features, one.features)


@pytest.fixture
def model():
    return pitome_vlm.wrap(tiny_model(), keep="auto", quality=0.7, keep_range=(0.05, 0.5))


def mixed_batch():
    """Two rows, three images, of which one is a single colour."""
    batch = tiny_batch(images=(1, 2), texts=(5, 9))
    batch["pixel_values"][1] = 0.0
    return batch


def test_counts_stay_within_their_bounds_and_differ(model):
    counts = visual_token_counts(model, mixed_batch()["pixel_values"])
    assert all(7 <= count <= 72 for count in counts)
    assert len(set(counts)) > 1
    assert schedule_of(model).counts_out == "7 to 72"
    assert "7 to 72 visual tokens per image" in pitome_vlm.describe(model).summary


@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_rows_are_rows_alone(model, side):
    batch = mixed_batch()
    if side == "right":
        batch |= {
            name: value
            for name, value in tiny_batch(images=(1, 2), texts=(5, 9), side=side).items()
            if name != "pixel_values"
        }
    answers = model.generate(**batch, **GREEDY)[:, -6:]
    first = [slice(0, 1), slice(1, 3)]
    for row in range(2):
        keep = batch["attention_mask"][row].bool()
        alone = model.generate(
            input_ids=batch["input_ids"][row : row + 1, keep],
            pixel_values=batch["pixel_values"][first[row]],
            **GREEDY,
        )
        if side == "left":
            assert torch.equal(answers[row], alone[0, -6:])
    compact = pitome_vlm.compact_inputs(model, **batch)
    assert (
        compact["token_sizes"][compact["attention_mask"].bool()].sum()
        == batch["attention_mask"].sum()
    )


def test_a_later_turn_knows_every_image_s_count(model):
    batch = mixed_batch()
    keep = batch["attention_mask"][1].bool()
    ids, pixels = batch["input_ids"][1:2, keep], batch["pixel_values"][1:]
    cache = DynamicCache(config=model.config.text_config)
    turn = model.generate(input_ids=ids, pixel_values=pixels, past_key_values=cache, **GREEDY)
    later = torch.cat([turn, torch.tensor([[7, 8]])], 1)
    fresh = model.generate(input_ids=later, pixel_values=pixels, **GREEDY)
    assert torch.equal(model.generate(input_ids=later, past_key_values=cache, **GREEDY), fresh)
    with (
        pitome_vlm.wrapped(model, keep="auto", quality=0.6, keep_range=(0.05, 0.5)),
        pytest.raises(ValueError, match=r"keep_range.*quality=0.6.*start a new cache"),
    ):
        model.generate(input_ids=later, past_key_values=cache, **GREEDY)


def test_what_does_not_fit_is_named():
    model = tiny_model()
    with pytest.raises(ValueError, match=r"'pool' reduces in one step.*keep='auto' needs another"):
        pitome_vlm.wrap(model, keep="auto", algorithm="pool")
    with pytest.raises(ValueError, match=r"'diffrate' ranks.*keep='auto' needs another algorithm"):
        pitome_vlm.wrap(model, keep="auto", algorithm="diffrate")
    with pytest.raises(TypeError, match=r"keep must be a number in .* or 'auto', got 'lots'"):
        pitome_vlm.wrap(model, keep="lots")
    with pytest.raises(ValueError, match=r"quality must be in \[0, 1\], got 2"):
        pitome_vlm.wrap(model, keep="auto", quality=2)
    with pytest.raises(ValueError, match=r"keep_range must be \(smallest, largest\)"):
        pitome_vlm.wrap(model, keep="auto", keep_range=(0.5, 0.1))


def test_an_adaptive_config_survives_a_file(tmp_path):
    config = MergeConfig(keep="auto", quality=0.8, keep_range=(0.1, 0.4))
    config.save_pretrained(tmp_path)
    assert MergeConfig.from_pretrained(tmp_path) == config
    assert config.replace(tokens=9) == MergeConfig(tokens=9, quality=0.8, keep_range=(0.1, 0.4))


def test_training_reaches_the_tower_through_ragged_images(model):
    batch = mixed_batch()
    labels = batch["input_ids"].masked_fill(batch["input_ids"] > 98, -100)
    model.train()
    model(**batch, labels=labels).loss.backward()
    (weight,) = (p for n, p in model.named_parameters() if n.endswith("patch_embedding.weight"))
    assert weight.grad.abs().sum() > 0


def test_the_whole_range_may_be_one_count():
    model = pitome_vlm.wrap(tiny_model(), keep="auto", keep_range=(0.25, 0.25))
    assert visual_token_counts(model, torch.randn(2, 3, 96, 96)) == [PATCHES // 4] * 2
