"""An ImageCache: the second question costs no tower and gets the same answer."""

from __future__ import annotations

import threading

import pytest
import torch
from original_llava import original_batch, original_model
from peft import LoraConfig, get_peft_model
from tiny import tiny_batch, tiny_model
from tiny_anyres import anyres_batch, anyres_model, anyres_pixels
from tiny_video import video_model, video_pixels

import pitome_vlm
from pitome_vlm import ImageCache


@pytest.fixture
def model():
    return pitome_vlm.wrap(tiny_model().eval(), keep=0.25)


def tower_calls(model):
    calls = []
    model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    return calls


def pixels(seed, images=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, 3, 96, 96, generator=generator)


@torch.no_grad()
def encode(model, cache, seed, **options):
    return pitome_vlm.encode_images(model, pixels(seed), image_cache=cache, **options)


def test_second_question_costs_no_tower_and_answers_alike(model):
    batch, cache, calls = tiny_batch(model), ImageCache(), tower_calls(model)
    options = {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(**batch, **options)
    assert torch.equal(model.generate(**batch, **options, image_cache=cache), expected)
    assert len(calls) == 2
    assert torch.equal(model.generate(**batch, **options, image_cache=cache), expected)
    with torch.no_grad():
        logits = model(**batch, image_cache=cache).logits
        assert len(calls) == 2
        assert torch.equal(logits, model(**batch).logits)
    assert (cache.hits, cache.misses, len(cache)) == (2, 1, 1)


def test_keep_one_takes_the_argument_and_runs_untouched(model):
    pitome_vlm.wrap(model, keep=1.0)
    batch, cache = tiny_batch(model), ImageCache()
    with torch.no_grad():
        assert torch.equal(model(**batch, image_cache=cache).logits, model(**batch).logits)
    assert len(cache) == 0


def test_other_pixels_options_weights_and_models_are_other_entries(model):
    cache, calls = ImageCache(), tower_calls(model)
    encode(model, cache, 0)
    encode(model, cache, 1)
    encode(model, cache, 0, vision_feature_layer=-1)
    pitome_vlm.wrap(model, keep=0.5)
    assert encode(model, cache, 0).counts == [72]
    with torch.no_grad():
        next(model.model.multi_modal_projector.parameters()).add_(1.0)
    encode(model, cache, 0)
    assert len(calls) == cache.misses == 5
    encode(pitome_vlm.wrap(tiny_model(seed=1).eval(), keep=0.5), cache, 0)
    assert cache.misses == 6
    assert cache.hits == 0


def test_gradients_are_never_cached(model):
    cache = ImageCache()
    for _ in range(2):
        tokens = pitome_vlm.encode_images(model, pixels(0), image_cache=cache)
        assert tokens.features[0].requires_grad
    assert len(cache) == 0


def test_memory_is_bounded_and_the_oldest_leave(model):
    encode(model, probe := ImageCache(), 0)
    cache = ImageCache(max_bytes=2 * probe.nbytes)
    for seed in (0, 1, 0, 2, 0):
        encode(model, cache, seed)
    assert (cache.hits, cache.misses, len(cache)) == (2, 3, 2)
    assert cache.nbytes == cache.max_bytes
    encode(model, small := ImageCache(max_bytes=8), 0)
    assert (len(small), small.nbytes) == (0, 0)
    cache.clear()
    assert (len(cache), cache.nbytes, cache.hits) == (0, 0, 0)


def test_another_feature_layer_or_autocast_is_another_entry(model):
    cache = ImageCache()
    first = encode(model, cache, 0).features[0]
    model.config.vision_feature_layer = -3
    assert not torch.equal(encode(model, cache, 0).features[0], first)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        encode(model, cache, 0)
    assert (cache.hits, cache.misses) == (0, 3)
    model.config.vision_feature_layer = -2
    assert torch.equal(encode(model, cache, 0).features[0], first)
    assert cache.hits == 1


def test_weights_made_in_inference_mode_can_be_cached():
    with torch.inference_mode():
        model = pitome_vlm.wrap(tiny_model().eval(), keep=0.25)
        cache = ImageCache()
        first, again = (encode(model, cache, 0).features[0] for _ in range(2))
    assert torch.equal(first, again)
    assert cache.hits == 1


def test_clearing_while_others_read_loses_nothing(model):
    cache, stop, failed = ImageCache(), threading.Event(), []

    def clear():
        # Many times per encoding, but without taking the processor from it.
        while not stop.wait(0.0005):
            cache.clear()

    clearing = threading.Thread(target=clear)
    clearing.start()
    expected = encode(model, None, 0).features[0]
    for _ in range(20):
        if not torch.equal(encode(model, cache, 0).features[0], expected):
            failed.append(1)
    stop.set()
    clearing.join()
    assert not failed
    cache.clear()
    assert (len(cache), cache.nbytes) == (0, 0)


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True])
def test_wrong_size_is_an_error(wrong):
    with pytest.raises((TypeError, ValueError), match="max_bytes"):
        ImageCache(max_bytes=wrong)


def test_threads_share_a_cache(model):
    cache, found = ImageCache(), {}
    expected = {seed: encode(model, None, seed).features[0] for seed in range(4)}

    def work(number):
        for seed in range(4):
            found[number, seed] = encode(model, cache, (seed + number) % 4).features[0]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(cache) == 4
    assert cache.misses >= 4
    before = cache.misses
    for seed in range(4):
        encode(model, cache, seed)
    assert cache.misses == before
    for (number, seed), feature in found.items():
        torch.testing.assert_close(feature, expected[(seed + number) % 4])


def same_answer_twice(model, batch, calls):
    """The second question gets the first one's answer without a tower; its cache and answer."""
    cache, options = ImageCache(), {"max_new_tokens": 3, "do_sample": False}
    expected = model.generate(**batch, **options)
    before = len(calls)
    for _ in range(2):
        assert torch.equal(model.generate(**batch, **options, image_cache=cache), expected)
    assert (cache.hits, cache.misses) == (1, 1)
    assert len(calls) == 2 * before
    return cache


def test_images_of_several_tiles_and_their_newline():
    model = pitome_vlm.wrap(anyres_model("next"), keep=0.25)
    batch, calls = anyres_batch(model), tower_calls(model)
    cache = same_answer_twice(model, batch, calls)
    with torch.no_grad():
        model.model.image_newline.add_(1.0)
        model(**batch, image_cache=cache)
        # The same pixels as another image: they are unpadded otherwise.
        tall = anyres_pixels(model, [(150, 60)])
        wide = tall | {"image_sizes": torch.tensor([(140, 60)])}
        for vision in (tall, wide):
            pitome_vlm.encode_images(model, **vision, image_cache=cache)
    assert (cache.hits, cache.misses) == (1, 4)


def test_videos():
    model, cache = pitome_vlm.wrap(video_model(), keep=0.25), ImageCache()
    calls = tower_calls(model)
    with torch.no_grad():
        for seed in (1, 2, 1):
            pitome_vlm.encode_videos(model, video_pixels(seed=seed), image_cache=cache)
    assert (cache.hits, cache.misses, len(calls)) == (1, 2, 2)


def test_original_package():
    model, batch = pitome_vlm.wrap(original_model(), keep=0.25), original_batch()
    calls, cache = [], ImageCache()
    model.get_vision_tower().register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        expected = model(**batch).logits
        for _ in range(2):
            assert torch.equal(model(**batch, image_cache=cache).logits, expected)
            # As a list of images: content counts, not what holds it.
            listed = batch | {"images": list(batch["images"])}
            assert torch.equal(model(**listed, image_cache=cache).logits, expected)
        listed["images"][-1] = listed["images"][-1] + 1
        assert not torch.equal(model(**listed, image_cache=cache).logits, expected)
    assert (cache.hits, cache.misses) == (2, 3)


def test_switched_lora_adapters_are_other_entries():
    lora = LoraConfig(target_modules=["linear_1"], r=2, init_lora_weights=False)
    model = get_peft_model(pitome_vlm.wrap(tiny_model(), keep=0.25), lora).eval()
    cache = ImageCache()
    with_adapter = encode(model, cache, 0)
    with model.disable_adapter():
        without = encode(model, cache, 0)
    again = encode(model, cache, 0)
    assert (cache.hits, cache.misses) == (1, 2)
    assert torch.equal(again.features[0], with_adapter.features[0])
    assert not torch.equal(again.features[0], without.features[0])


def test_compact_inputs_use_and_drop_it(model):
    batch, cache = tiny_batch(model), ImageCache()
    with torch.no_grad():
        for _ in range(2):
            found = pitome_vlm.compact_inputs(model, **batch, image_cache=cache)
    assert cache.hits == 1
    assert "image_cache" not in found
    words = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert pitome_vlm.compact_inputs(model, **words, image_cache=cache).keys() == words.keys()


def test_something_else_is_an_error(model):
    with pytest.raises(TypeError, match=r"image_cache must be a pitome_vlm\.ImageCache, got dict"):
        model.generate(**tiny_batch(model), image_cache={})
