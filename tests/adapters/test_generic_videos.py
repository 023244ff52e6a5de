"""Videos of the families that are a record of the generic adapter."""

from __future__ import annotations

import pytest
import torch
from refused_family import else_refused
from tiny_families import FAMILIES, GROUPS
from tiny_family import IMAGE, VIDEO
from tiny_family_videos import family_videos, gemma4_videos, minicpm_videos
from transformers import DynamicCache

import pitome_vlm
from pitome_vlm.releases import CACHE_NAME, RELEASE
from pitome_vlm.wrapping.merging import CallPlan

GREEDY = {"max_new_tokens": 4, "do_sample": False}
NAMES = ("qwen3_vl", "qwen3_5", "glm4v", "glm46v", "video_llama_3")


def the_merging_path_is_the_model(model, batch):
    logits, answer = model(**batch).logits, model.generate(**batch, **GREEDY)
    pitome_vlm.wrap(model, keep=1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CallPlan, "is_identity", lambda self: False)
        torch.testing.assert_close(model(**batch).logits, logits, atol=1e-3, rtol=1e-4)
        assert torch.equal(model.generate(**batch, **GREEDY), answer)


def every_way_is_one(model, batch, counts):
    """Counts of every video (or frame), and answers with and without caches."""
    asked = {name: value for name, value in batch.items() if "video" in name or "down" in name}
    assert pitome_vlm.encode_videos(model, **asked).counts == counts
    compact = pitome_vlm.compact_inputs(model, **batch)
    answer = model.generate(**batch, **GREEDY)
    for more in ({"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(**batch, **GREEDY, **more), answer), more
    assert torch.equal(model.generate(**compact, **GREEDY)[:, -4:], answer[:, -4:])


@pytest.mark.parametrize("name", NAMES)
@else_refused()
@torch.no_grad()
def test_videos_with_time_stamps_between_their_frames(name):
    model, batch = FAMILIES[name].model(), family_videos(name)
    the_merging_path_is_the_model(model, batch)
    for options, count in (({}, 22), ({"temporal": True}, 22), ({"tokens": 3}, 3)):
        pitome_vlm.wrap(model, **({} if "tokens" in options else {"keep": 0.3}) | options)
        every_way_is_one(model, batch, [count])


@else_refused("qwen3_vl", "video_llama_3")
@torch.no_grad()
def test_an_image_and_a_video_share_a_prompt():
    for name in ("qwen3_vl", "video_llama_3"):
        model, batch = FAMILIES[name].model(), family_videos(name, image=True, rows=2)
        the_merging_path_is_the_model(model, batch)
        pitome_vlm.wrap(model, keep=0.25)
        every_way_is_one(model, batch, [18, 18])
        ids = pitome_vlm.compact_inputs(model, **batch)["input_ids"]
        assert [int((ids == token).sum()) for token in (IMAGE, VIDEO)] == [8, 36]


@else_refused("glm4v")
@torch.no_grad()
def test_kinds_with_one_placeholder_come_in_turns():
    model, video = FAMILIES["glm4v"].model(), family_videos("glm4v")
    image = FAMILIES["glm4v"].batch(images=(1,), texts=(0,))
    pitome_vlm.wrap(model, keep=0.3)
    with pytest.raises(ValueError, match=r"one placeholder for image and video; .*turns"):
        model(**family_videos("glm4v", image=True))
    for first, second in ((image, video), (video, image)):
        whole = {
            name: torch.cat([first[name], second[name]], 1)
            for name in ("input_ids", "attention_mask", "mm_token_type_ids")
        }
        caches = [DynamicCache(), DynamicCache()]
        for cache in caches:
            model(**first, **{CACHE_NAME: cache}, use_cache=True)
        answer = model.generate(**second | whole, **GREEDY, **{CACHE_NAME: caches[0]})
        held = caches[1].get_seq_length() + second["input_ids"].shape[1]
        mask = {"attention_mask": torch.ones(1, held, dtype=torch.long)}
        step = model(**second | mask, **{CACHE_NAME: caches[1]})
        assert int(step.logits[0, -1].argmax()) == int(answer[0, -4])


@else_refused("video_llama_3")
@torch.no_grad()
def test_tokens_that_the_prompt_does_not_show_are_not_merged():
    """VideoLLaMA3's processor leaves out what did not change since the frame before."""
    shown = torch.rand(3, 24, generator=torch.Generator().manual_seed(5)) < 0.5
    shown[0] = True
    model, batch = FAMILIES["video_llama_3"].model(), family_videos("video_llama_3", shown=shown)
    the_merging_path_is_the_model(model, batch)
    full = int(shown.sum())
    for options in ({}, {"temporal": True}, {"algorithm": "pool"}, {"algorithm": "tome"}):
        pitome_vlm.wrap(model, keep=0.25, **options)
        every_way_is_one(model, batch, [round(full / 4)])
    whole = family_videos("video_llama_3", shown=torch.ones(3, 24, dtype=torch.bool))
    plain = {n: v for n, v in whole.items() if n != "video_compression_mask"}
    assert torch.equal(model(**whole).logits, model(**plain).logits)
    batch["video_compression_mask"] = batch["video_compression_mask"][:-1]
    with pytest.raises(ValueError, match=r"video_compression_mask is about 71 tokens, .* 72"):
        model(**batch)


@else_refused("minicpmv4_6")
@torch.no_grad()
def test_frames_of_minicpm_are_merged_one_by_one():
    for mode, count in (("16x", 6), ("4x", 24)):
        model, batch = FAMILIES["minicpmv4_6"].model(), minicpm_videos(mode=mode)
        the_merging_path_is_the_model(model, batch)
        pitome_vlm.wrap(model, keep=0.25)
        every_way_is_one(model, batch, [count, count])


@else_refused("gemma4")
@torch.no_grad()
def test_frames_of_gemma_4_share_a_budget():
    for family in (FAMILIES["gemma4"], GROUPS["padded"]["gemma4, large"]):
        model, batch = family.model(), gemma4_videos()
        if RELEASE < (5, 23):
            try:
                model.generate(**batch, **GREEDY)
                model(**batch)
            except (IndexError, ValueError):
                continue  # Unwrapped, it fails on videos.
        the_merging_path_is_the_model(model, batch)
        for options, counts in (({}, [6, 14]), ({"temporal": True}, [6, 14])):
            pitome_vlm.wrap(model, keep=0.5, **options)
            every_way_is_one(model, batch, counts)
        batch.pop("num_frames_per_video")
        with pytest.raises(ValueError, match="num_frames_per_video is missing"):
            model(**batch)
