"""Wrapped encoders in the hands of libraries: pipelines, Trainer, PEFT, saving and copying."""

from __future__ import annotations

import copy
import pickle

import peft
import pytest
import tiny_clip_checkpoint as clip
import torch
import transformers as hf
from PIL import Image
from tiny_encoders import PATCHES, TINY

import pitome_vlm
from pitome_vlm.adapters.encoders import find_encoder
from pitome_vlm.wrapping.wrap import is_wrapped, schedule_of, wrapped

IMAGES = [Image.linear_gradient("L").convert("RGB"), Image.radial_gradient("L").convert("RGB")]


def unlike_unmerged(run, model):
    """What a run gives while merging is on; it must differ from what it gives otherwise."""
    merged = run()
    with wrapped(model, keep=1.0):
        assert run() != merged
    return merged


def test_image_classification():
    model = TINY["vit classes"].model()
    pitome_vlm.wrap(model, ratio=0.7)
    pipe = hf.pipeline("image-classification", model, image_processor=clip.image_processor("ViT"))
    found = unlike_unmerged(lambda: pipe(IMAGES, batch_size=2), model)
    assert [len(one) for one in found] == [5, 5]
    alone = [pipe(image) for image in IMAGES]
    pairs = zip(found, alone, strict=True)
    assert all(abs(a[0]["score"] - b[0]["score"]) < 1e-4 for a, b in pairs)


def test_zero_shot_image_classification():
    model = clip.model()
    pitome_vlm.wrap(model, ratio=0.7)
    pipe = hf.pipeline(
        "zero-shot-image-classification",
        model,
        tokenizer=clip.tokenizer(),
        image_processor=clip.image_processor(),
    )
    labels = {"candidate_labels": ["red", "blue circle"]}
    found = unlike_unmerged(lambda: pipe(IMAGES[0], **labels), model)
    assert {one["label"] for one in found} == set(labels["candidate_labels"])


def test_image_feature_extraction():
    model = TINY["dinov2"].model()
    pitome_vlm.wrap(model, ratio=0.7)
    processor = clip.image_processor("ViT")
    pipe = hf.pipeline("image-feature-extraction", model, image_processor=processor)
    found = torch.tensor(unlike_unmerged(lambda: pipe(IMAGES[0]), model))
    assert found.shape == (1, PATCHES + 1, 32)
    assert len(found[0].unique(dim=0)) == schedule_of(model).tokens_out


def test_trainer(tmp_path):
    model = TINY["vit classes"].model()
    pitome_vlm.wrap(model, ratio=0.8)
    rows = [{"pixel_values": torch.randn(3, 48, 48), "labels": i % 5} for i in range(4)]
    before = copy.deepcopy(model.state_dict())
    given = {"per_device_train_batch_size": 2, "max_steps": 2, "report_to": [], "use_cpu": True}
    trainer = hf.Trainer(model, hf.TrainingArguments(str(tmp_path), **given), train_dataset=rows)
    assert trainer.train().training_loss > 0
    changed = [
        name for name, one in model.state_dict().items() if not torch.equal(one, before[name])
    ]
    # No row was left out for want of a column.
    assert len(changed) > len(before) / 2
    assert set(trainer.predict(rows).predictions.shape) == {4, 5}


def test_saved_and_copied(tmp_path):
    model, inputs = TINY["clip"].model(), TINY["clip"].inputs()
    pitome_vlm.wrap(model, ratio=0.8, algorithm="tome")
    with torch.no_grad():
        expected = model(**inputs).logits_per_image
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert is_wrapped(other)
            assert torch.equal(other(**inputs).logits_per_image, expected)
            pitome_vlm.unwrap(other)
            assert not torch.equal(other(**inputs).logits_per_image, expected)
        assert torch.equal(model(**inputs).logits_per_image, expected)
        model.save_pretrained(tmp_path)
        assert (tmp_path / "pitome_config.json").exists()
        again = hf.CLIPModel.from_pretrained(tmp_path)
        assert again.config.architectures == ["CLIPModel"]
        config = pitome_vlm.MergeConfig.from_pretrained(tmp_path)
        pitome_vlm.wrap(again, config=config)
        assert torch.equal(again(**inputs).logits_per_image, expected)


def test_printed():
    model = TINY["clip"].model()
    pitome_vlm.wrap(model, ratio=0.8)
    assert "pitome: pitome_plus ratio=0.8, 37 -> " in repr(model)
    assert repr(model).count("pitome layer") == 4
    pitome_vlm.unwrap(model)
    assert "pitome" not in repr(model)


def test_an_adapter_of_peft():
    model, inputs = TINY["vit classes"].model(), TINY["vit classes"].inputs()
    encoder = find_encoder(model)
    names = ["q_proj"] if hasattr(encoder, "layers") else ["query"]
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=names, r=2))
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.2)
    with torch.no_grad():
        expected = tuned(**inputs).logits
        pitome_vlm.wrap(tuned, ratio=0.8)
        merged = tuned(**inputs).logits
        with tuned.disable_adapter():
            assert not torch.equal(tuned(**inputs).logits, merged)
        pitome_vlm.unwrap(tuned)
        assert torch.equal(tuned(**inputs).logits, expected)
        assert not torch.equal(merged, expected)


@pytest.mark.slow
def test_compiled():
    model, inputs = TINY["vit"].model(), TINY["vit"].inputs()
    pitome_vlm.wrap(model, ratio=0.8, algorithm="tome")
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        found = torch.compile(model, backend="eager")(**inputs).last_hidden_state
    assert torch.allclose(found, expected, atol=1e-5)
