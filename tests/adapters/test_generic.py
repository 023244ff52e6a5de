"""Families that are a record of the generic adapter, each on a tiny random model.

A check loops over all families and names those that fail.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from refused_family import SERVED, else_refused, refused
from tiny_families import FAMILIES, GROUPS
from tiny_family import SPECIAL
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

import pitome_vlm
from pitome_vlm import adapters, releases
from pitome_vlm.adapters import Family, find_adapter, register, tiles
from pitome_vlm.adapters.families import FAMILIES as FAMILY_RECORDS
from pitome_vlm.measure.flops import linear_flops
from pitome_vlm.merge import algorithms
from pitome_vlm.releases import CACHE_NAME
from pitome_vlm.wrapping.encode import prompt_images
from pitome_vlm.wrapping.merging import CallPlan
from pitome_vlm.wrapping.wrap import is_wrapped

OWN = FAMILIES | {name: one for name, one in GROUPS["padded"].items() if "," in name}
# Counted by another formula than what these towers do: they pad images (LFM2), merge inside
# (MiniCPM), pool by attention (Molmo 2) or a matrix (Gemma 4), look features up (Ovis 2),
# or are told by the call how to merge (VideoLLaMA3).
OTHER_FLOPS = (
    "gemma4",
    "gemma4, large",
    "lfm2_vl",
    "minicpmv4_6",
    "molmo2",
    "ovis2",
    "video_llama_3",
)
# What comes later in a prompt changes what comes before it, so that a cache cannot equal a fresh
# conversation, wrapped or not: words and later images in PaliGemma, later images in Molmo 2.
SEES_LATER_WORDS, SEES_LATER_IMAGES = ("paligemma",), ("paligemma", "molmo2")
PARTS = 12
GREEDY = {"max_new_tokens": 4, "do_sample": False}


def relative(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def every_family(check):
    """A test of several parts, each of which runs a check for some of the families.

    On releases of transformers without what these models need, that they are refused.
    """
    check, name_of_check = (check if SERVED else refused), check.__name__

    @pytest.mark.parametrize("part", range(PARTS))
    def test(part):
        failed = {}
        for name in list(OWN)[part::PARTS]:
            try:
                with torch.set_grad_enabled(name_of_check.startswith("test_gradients")):
                    check(OWN[name])
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {error}"
        assert not failed, "\n".join(f"{name}: {why}" for name, why in failed.items())

    return test


@every_family
def test_keeping_everything_is_the_model_itself(family):
    model, batch = family()
    logits, answer = model(**batch).logits, model.generate(**batch, **GREEDY)
    classes = [type(module) for module in model.modules()]
    pitome_vlm.wrap(model, keep=1.0)
    assert torch.equal(model(**batch).logits, logits)
    assert torch.equal(model.generate(**batch, **GREEDY), answer)
    pitome_vlm.wrap(model, keep=0.25)
    assert not torch.equal(model(**batch).logits[:, -1], logits[:, -1])
    pitome_vlm.unwrap(model)
    assert torch.equal(model(**batch).logits, logits)
    assert [type(module) for module in model.modules()] == classes


@every_family
def test_merging_nothing_on_the_merging_path_is_the_model(family):
    # Padded at the end: a bare forward counts columns of padding at the start as places, which
    # turns all keys alike and leaves another rounding. `generate` counts as merging does.
    (model, left), right = family(), family.batch(side="right")
    logits, answer = model(**right).logits, model.generate(**left, **GREEDY)
    pitome_vlm.wrap(model, keep=1.0)
    shown = right["attention_mask"] != 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CallPlan, "is_identity", lambda self: False)
        assert relative(model(**right).logits[shown], logits[shown]) < 1e-6
        assert torch.equal(model.generate(**left, **GREEDY), answer)


@every_family
def test_counts_are_those_that_were_promised(family):
    model, batch = family()
    images = [image for row in family.tokens() for image in row]
    if family is OWN.get("molmo2"):
        # The whole image and its crops are merged together.
        images = [(sum(image),) for image in images]
    tokens = [tile for image in images for tile in image]
    for keep in (0.25, 0.3):
        pitome_vlm.wrap(model, keep=keep)
        images = prompt_images(model, batch)
        assert [image.full for image in images] == tokens
        counts = [image.count for image in images]
        assert all(abs(n - keep * full) < 1 for n, full in zip(counts, tokens, strict=True))
        compact = pitome_vlm.compact_inputs(model, **batch)
        shown = (compact["input_ids"] == family.image_token).sum()
        assert int(shown) == sum(counts)
        kept = sum(counts) + int(batch["attention_mask"].sum()) - sum(tokens)
        assert int(compact["attention_mask"].sum()) == kept


@every_family
def test_caches_and_beams_change_nothing(family):
    model, batch = family()
    pitome_vlm.wrap(model, keep=0.3)
    answer = model.generate(**batch, **GREEDY)
    assert torch.equal(model.generate(**batch, **GREEDY, use_cache=False), answer)
    together = model.generate(**batch, **GREEDY, num_beams=2)
    alone = family.batch(images=(1,), texts=(3,))
    assert torch.equal(model.generate(**alone, **GREEDY, num_beams=2)[0, -4:], together[0, -4:])


@every_family
def test_both_padding_sides_give_the_same_logits(family):
    model, left = family()
    right = family.batch(side="right")
    pitome_vlm.wrap(model, keep=0.3)
    found = []
    for batch in (left, right):
        shown = pitome_vlm.compact_inputs(model, **batch)["attention_mask"] != 0
        found.append(model(**batch).logits[shown])
    assert relative(*found) < 1e-5


def turns(model, family, *, later):
    """A first turn with an image and a later one on its cache, next to a fresh conversation."""
    whole = family.batch(images=(2,) if later else (1,), texts=(5,))
    begin = family.batch(images=(1,), texts=(0,))
    length = begin["input_ids"].shape[1]
    assert torch.equal(whole["input_ids"][:, :length], begin["input_ids"])
    fresh = model.generate(**whole, **GREEDY)
    cache = DynamicCache(config=model.config.get_text_config())
    model(**begin, **{CACHE_NAME: cache}, use_cache=True)
    given = (
        whole if later else {n: v for n, v in whole.items() if n in ("input_ids", "attention_mask")}
    )
    return model.generate(**given, **GREEDY, **{CACHE_NAME: cache}), fresh


@every_family
def test_later_turns_go_on_from_the_cache(family):
    model = pitome_vlm.wrap(family.model(), keep=0.3)
    for later, exempt in ((False, SEES_LATER_WORDS), (True, SEES_LATER_IMAGES)):
        if family in [OWN[name] for name in exempt if name in OWN]:
            continue
        found, fresh = turns(model, family, later=later)
        assert torch.equal(found, fresh), f"later image: {later}"


@every_family
def test_drafts_change_nothing(family):
    batch = family.batch(images=(1,), texts=(3,))
    model = family.model()
    if model._is_stateful or family is OWN.get("paligemma"):
        # Refused by transformers; and a prompt that sees the draft after it.
        return
    answer = pitome_vlm.wrap(model, keep=0.3).generate(**batch, **GREEDY)
    assistant = family.model(seed=1)
    for _ in range(2):
        assert torch.equal(model.generate(**batch, **GREEDY, assistant_model=assistant), answer)
        pitome_vlm.wrap(assistant, keep=0.3)


@every_family
def test_a_part_of_an_image_may_be_masked(family):
    model, batch = family()
    pitome_vlm.wrap(model, keep=0.3)
    inside = (batch["input_ids"][1] == family.image_token).nonzero()[3:9, 0]
    whole, mask = model(**batch).logits, batch["attention_mask"].clone()
    mask[1, inside] = 0
    part = model(**batch | {"attention_mask": mask}).logits
    if not family.first:
        torch.testing.assert_close(part[0], whole[0], atol=1e-3, rtol=1e-4)
    assert part.isfinite().all()
    assert not torch.equal(part[1, -1], whole[1, -1])
    model.generate(**batch | {"attention_mask": mask}, **GREEDY)


@every_family
def test_what_does_not_belong_to_the_pixels_is_named(family):
    model, batch = family()
    pitome_vlm.wrap(model, keep=0.3)
    names = ("image_grid_thw", "image_sizes", "spatial_shapes", "target_sizes")
    found = [name for name in names if name in batch]
    wrong = [batch | {"pixel_values": batch["pixel_values"][:-1]}]
    for name in found:
        larger = batch[name].clone()
        larger[0, -1] *= 2
        wrong += [batch | {name: larger}, batch | {name: batch[name][:-1]}]
    if family is OWN.get("minicpmv4_6"):
        wrong = wrong[1:]  # All its images share the first row of pixels.
    for given in wrong:
        for call in (model, model.generate):
            with pytest.raises(ValueError, match=r"as the processor|placeholders"):
                call(**given)


@every_family
def test_a_prompt_that_is_shortened_already(family):
    """Places follow from the whole prompt."""
    model, batch = family()
    pitome_vlm.wrap(model, keep=0.3)
    compact = pitome_vlm.compact_inputs(model, **batch)
    given = {name: compact.get(name, value) for name, value in batch.items()}
    given = {n: v for n, v in given.items() if n in compact or not n.endswith("type_ids")}
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=r"placeholders where .* are needed: this model's"):
            call(**given)


@every_family
def test_gradients_reach_the_tower(family):
    model, batch = family()
    pitome_vlm.wrap(model, keep=0.3).train()
    # Special tokens may lie outside of what the model predicts.
    hidden = (batch["attention_mask"] == 0) | (batch["input_ids"] >= SPECIAL)
    labels = batch["input_ids"].masked_fill(hidden, -100)
    model(**batch | {"labels": labels}).loss.backward()
    tower = find_adapter(model).parts(model).vision_tower
    assert any(p.grad is not None and p.grad.any() for p in tower.parameters())


@pytest.mark.parametrize("name", ["internvl", "qwen3_vl", "gemma3", "mistral3"])
@else_refused()
@torch.no_grad()
def test_every_algorithm_that_needs_no_tower_attention(name):
    model, batch = FAMILIES[name]()
    for algorithm in algorithms.available():
        if algorithm == "none" or algorithms.get(algorithm).needs_attention:
            continue
        pitome_vlm.wrap(model, keep=0.3, algorithm=algorithm)
        assert model(**batch).logits.isfinite().all(), algorithm
    pitome_vlm.wrap(model, keep="auto")
    cache = pitome_vlm.ImageCache()
    first = model(**batch, image_cache=cache).logits
    assert first.isfinite().all()
    assert torch.equal(model(**batch, image_cache=cache).logits, first)
    assert cache.hits == 1


@every_family
def test_flops_are_what_is_computed(family):
    if family in [OWN[name] for name in OTHER_FLOPS if name in OWN]:
        return
    model = family.model()
    model.set_attn_implementation("eager")
    batch, adapter = family.batch(images=(1,), texts=(3,)), find_adapter(model)
    names = {name for own in adapter.family.inputs.values() for name in own}
    with FlopCounterMode(display=False) as counter:
        model.model.get_image_features(**{n: v for n, v in batch.items() if n in names})
    projector = linear_flops(adapter.parts(model).projector)
    found = sum(
        adapter.tower_flops(model, one) + one.full * projector
        for one in adapter.footprints(model, batch)["image"]
    )
    assert found == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert "visual tokens" in str(pitome_vlm.describe(model))


@else_refused("qwen3_vl")
def test_deeper_levels_are_merged_like_the_features():
    """Qwen3-VL adds further features of the same tokens to the states of its first layers."""
    model, batch = FAMILIES["qwen3_vl"]()
    pitome_vlm.wrap(model, keep=0.3, stage="projector")
    asked = {name: batch[name] for name in ("pixel_values", "image_grid_thw")}
    with torch.no_grad():
        visual = pitome_vlm.encode_images(model, **asked)
        own = model.model.get_image_features(**asked)
        compact = pitome_vlm.compact_inputs(model, **batch)
        handed = compact["mm_encoder_outputs"]["image"]
    assert len(handed.deepstack_features) == len(own.deepstack_features) > 0
    for merged, level in zip(handed.deepstack_features, own.deepstack_features, strict=True):
        parts = torch.split(torch.cat(list(level)), visual.full_counts)
        expected = [
            torch.stack([part[source == token].mean(0) for token in range(count)])
            for part, source, count in zip(parts, visual.source_maps, visual.counts, strict=True)
        ]
        torch.testing.assert_close(
            torch.cat(list(merged)), torch.cat(expected), atol=1e-5, rtol=1e-5
        )


@else_refused("qwen3_vl", "mistral3")
def test_what_belongs_to_an_image_is_asked_for():
    for name, missing in (("qwen3_vl", "image_grid_thw"), ("mistral3", "image_sizes")):
        model, batch = FAMILIES[name]()
        pitome_vlm.wrap(model, keep=0.3)
        given = copy.copy(batch)
        given.pop(missing)
        with pytest.raises(ValueError, match=f"{missing} is missing"):
            model(**given)


@else_refused("internvl")
def test_prompts_of_embeddings_are_refused():
    model, batch = FAMILIES["internvl"]()
    pitome_vlm.wrap(model, keep=0.3)
    embeds = model.get_input_embeddings()(batch.pop("input_ids"))
    with pytest.raises(ValueError, match="by input_ids; pass them instead of inputs_embeds"):
        model(inputs_embeds=embeds, **batch)


def documented_record():
    doc = Path(__file__).parents[2] / "docs" / "adding-a-model.md"
    blocks = re.findall(r"```python\n(.*?)```", doc.read_text(encoding="utf-8"), re.S)
    return next(block for block in blocks if "Family(" in block)


@else_refused("glm4v")
@torch.no_grad()
def test_the_record_of_the_docs_is_enough(monkeypatch):
    monkeypatch.setattr(adapters, "ADAPTERS", list(adapters.ADAPTERS))
    model, batch = FAMILIES["glm4v"]()
    expected = pitome_vlm.wrap(copy.deepcopy(model), keep=0.3)(**batch).logits
    renamed = type("ToyConfig", (type(model.config),), {"model_type": "toy_grid_vlm"})
    model.config.__class__ = renamed
    with pytest.raises(TypeError, match=r"toy_grid_vlm.*register\(\) takes further families"):
        pitome_vlm.wrap(model, keep=0.3)
    exec(documented_record(), {})
    assert torch.equal(pitome_vlm.wrap(model, keep=0.3)(**batch).logits, expected)
    with pytest.raises(ValueError, match="'toy_grid_vlm' is already served by GenericAdapter"):
        register(Family(("toy_grid_vlm",), tiles(lambda config: 16)))
    with pytest.raises(TypeError, match=r"register takes a .*Family.* got 'glm4v'"):
        register("glm4v")
    record = Family(("toy_tile_vlm",), tiles(lambda config: 16))
    assert register(record) is register(record)


def test_the_docs_name_every_family():
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z0-9_]+)`", page))
    own = {name for family in FAMILY_RECORDS for name in family.model_types}
    assert own <= named


def test_older_releases_are_named(monkeypatch):
    later = {"minicpmv4_6": "5.19", "paddleocr_vl": "5.21", "smolvlm": "5.21"}
    for name, first in ({"internvl": "5.18", "idefics3": "5.18"} | later).items():
        if name not in FAMILIES:
            continue  # The installed release has no such model, or does not serve it itself.
        with monkeypatch.context() as patch:
            patch.setattr(releases, "RELEASE", (5, int(first[2:]) - 1))
            model = FAMILIES[name].model()
            with pytest.raises(
                TypeError, match=rf"{type(model).__name__} needs .* {first} or later"
            ):
                pitome_vlm.wrap(model, keep=0.3)
            assert not is_wrapped(model), name
