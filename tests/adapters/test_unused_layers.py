"""Tower layers after the feature layer are not run where tokens are merged, or on request."""

from __future__ import annotations

import pytest
import torch
from original_llava import original_batch, original_model
from tiny import tiny_batch, tiny_model
from tiny_anyres import anyres_batch, anyres_model
from tiny_video import video_model, video_pixels

import pitome_vlm
from pitome_vlm.adapters import find_adapter
from pitome_vlm.adapters.tower import find_encoder_layers
from pitome_vlm.measure.accounting import costs

GREEDY = {"max_new_tokens": 3, "do_sample": False}
# Model, batch, and the layers of its tower that are read.
CASES = {
    "clip": (tiny_model, tiny_batch),
    "next": (lambda: anyres_model("next"), anyres_batch),
    "next_list": (lambda: anyres_model("next_list"), anyres_batch),
    "onevision": (lambda: anyres_model("onevision"), anyres_batch),
    "original": (original_model, lambda _: original_batch(images=(1,), texts=(5,))),
}


def layers_run(model):
    """How often every layer of the tower has computed, counted live."""
    layers = find_encoder_layers(find_adapter(model).parts(model).vision_tower)[0]
    counts = [0] * len(layers)
    for index, layer in enumerate(layers):

        def count(*_, index=index):
            counts[index] += 1

        layer.mlp.register_forward_hook(count)
    return counts


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_keep_one_without_them_is_bit_identical(case):
    make, batch_of = CASES[case]
    model = make().eval()
    batch = batch_of(model)
    expected = model(**batch).logits
    counts = layers_run(model)
    used = find_adapter(model).tower_shape(model).used_layers
    unread = len(counts) - used
    assert (unread == 0) == (case == "onevision")

    pitome_vlm.wrap(model, keep=1.0)
    assert torch.equal(model(**batch).logits, expected)
    assert min(counts) > 0
    everything = costs(model).tower_flops
    counts[:] = [0] * len(counts)

    pitome_vlm.wrap(model, keep=1.0, skip_unused_layers=True)
    assert torch.equal(model(**batch).logits, expected)
    assert sum(map(bool, counts)) == used
    assert counts[used:] == [0] * unread
    assert (costs(model).tower_flops < everything) == (unread > 0)


@torch.no_grad()
def test_generate_and_features_chosen_by_the_call():
    model = tiny_model().eval()
    batch = tiny_batch(model)
    answer = model.generate(**batch, **GREEDY)
    last = model(**batch, vision_feature_layer=-1).logits
    counts = layers_run(pitome_vlm.wrap(model, keep=1.0, skip_unused_layers=True))
    assert torch.equal(model.generate(**batch, **GREEDY), answer)
    assert counts[-1] == 0
    # What a call reads decides, not what the config says.
    assert torch.equal(model(**batch, vision_feature_layer=-1).logits, last)
    assert counts[-1] == 1


@torch.no_grad()
def test_videos():
    model = video_model("video_llava")
    pixels = video_pixels()
    full = pitome_vlm.describe(model, frames=4).footprint.full
    ids = torch.cat([torch.tensor([1]), torch.full((full,), model.config.video_token_id)])
    batch = {"input_ids": torch.cat([ids, torch.tensor([5, 6])])[None]}
    batch["pixel_values_videos"] = pixels
    expected = model(**batch).logits
    towers = find_adapter(model).parts(model).towers
    ran = []
    for tower in towers:
        hook = find_encoder_layers(tower)[0][-1].mlp.register_forward_hook
        hook(lambda *_: ran.append(1))
    pitome_vlm.wrap(model, keep=1.0, skip_unused_layers=True)
    assert torch.equal(model(**batch).logits, expected)
    assert not ran


def test_gradients_are_the_same():
    model = tiny_model().train()
    batch = tiny_batch(model)
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == model.config.image_token_id, -100)
    found = []
    for skip in (False, True):
        pitome_vlm.wrap(model, keep=1.0, skip_unused_layers=skip)
        model.zero_grad()
        model(**batch, labels=labels).loss.backward()
        found.append({name: w.grad for name, w in model.named_parameters() if w.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_it_is_a_yes_or_no():
    with pytest.raises(TypeError, match="skip_unused_layers must be True or False, got 1"):
        pitome_vlm.MergeConfig(keep=1.0, skip_unused_layers=1)
