"""Rows whose answers `max_length` cuts off are counted before a run, and refused if all are so."""

from __future__ import annotations

import warnings

import pytest
import torch
from checkpoint import save_checkpoint
from training_data import record, records

import pitome_vlm
from pitome_vlm.demo.processor import build_processor
from pitome_vlm.training import Collator, DataError, LoraOptions, from_records, train

# Rows of one image, question and answer have 147 tokens before the answer; long ones have more.
LONG = "is the red circle left of the blue square ? " * 20


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("answers")
    save_checkpoint(folder / "model")
    short = records(folder, 4)
    return folder, short, [record("0.png", LONG, "yes") for _ in range(4)]


def trained(place, name, rows, **options):
    model, processor = pitome_vlm.load(place[0] / "model", tokens=16, dtype="float32")
    output = place[0] / name
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(
                model,
                processor,
                rows,
                output,
                image_folder=place[0],
                lora=LoraOptions(rank=2),
                max_steps=1,
                per_device_train_batch_size=8,
                bf16=False,
                **options,
            )
    except DataError as error:
        assert not output.exists()
        assert not hasattr(model, "peft_config")
        return str(error)
    said = [str(one.message) for one in caught]
    return [text for text in said if "max_length" in text]


def test_nothing_to_learn_is_refused_before_anything_is_written(place):
    _, short, long = place
    said = trained(place, "none", short, max_length=147)
    assert "max_length=147 cuts every answer off in all 4 records" in said
    assert "tokens 15" in said
    assert "Raise max_length" in said
    assert "of 4 records" not in said
    said = trained(place, "val", short, val_data=long, max_length=200)
    assert "in all 4 records" in said
    cut = [*short, record(["0.png"] * 2, "<image> same ?", "yes")]
    said = trained(place, "image", cut, max_length=200)
    assert said.startswith("records[4]: max_length=200 would cut an image in two; raise it, or ")


def test_some_records_without_an_answer_are_counted(place):
    _, short, long = place
    (said,) = trained(place, "some", [*short, *long[:2]], max_length=200)
    assert "records: max_length=200 cuts every answer off in 2 of 6 records; nothing" in said


def test_of_much_data_some_is_looked_at_and_all_that_was_trained_on_is_counted(place):
    _, short, long = place
    assert trained(place, "fine", short * 20, max_length=200) == []
    before, after = trained(place, "many", [*short, *long] * 20, max_length=200)
    assert "in 32 of 64 records looked at (of 160); nothing" in before
    assert "of the 8 rows trained on had no answer left after max_length=200" in after


def test_only_tokens_are_cut_not_the_patches_of_an_image():
    """Some towers take patches as rows of [patches, values], as wide as a long row of tokens."""
    collate = Collator(build_processor(), max_length=150)
    (example,) = [from_records([{"messages": chat()}], text_only=True)[0]]
    batch = collate.whole([example])
    wide = {name: torch.nn.functional.pad(value, (0, 200)) for name, value in batch.items()}
    cut = collate.cut(
        wide | {"pixel_values": torch.ones(4, 160), "sizes": torch.ones(1, 2)}, [example]
    )
    assert cut["input_ids"].shape == cut["labels"].shape == (1, 150)
    assert (cut["pixel_values"].shape, cut["sizes"].shape) == ((4, 160), (1, 2))


def chat():
    return [{"role": "user", "content": "red ?"}, {"role": "assistant", "content": "yes"}]


def test_options_that_train_nothing_or_fail_later_leave_model_and_folder_as_they_were(place):
    folder, short, _ = place
    model, processor = pitome_vlm.load(folder / "model", tokens=16, dtype="float32")
    before = {name: (type(module), module.training) for name, module in model.named_modules()}
    for options, said in {
        "epochs": ({"num_train_epochs": 0}, "num_train_epochs must be above 0, got 0"),
        "steps": ({"max_steps": 0}, "max_steps must be at least 1, got 0"),
        "batch": ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at"),
        "eval batch": ({"per_device_eval_batch_size": -1}, "per_device_eval_batch_size must be at"),
        "accumulation": ({"gradient_accumulation_steps": 0.5}, "must be a whole number, got 0.5"),
        "no length": ({"max_length": 0}, "max_length must be at least 1, got 0"),
        "length": ({"max_length": "200"}, "max_length must be a whole number, got '200'"),
        "drop": (
            {"dataloader_drop_last": True, "per_device_train_batch_size": 5},
            "records has 4 conversations, and a batch of all processes 5",
        ),
        "lengths": ({"train_sampling_strategy": "group_by_length"}, "group_by_length needs the"),
        "share": ({"val_fraction": "0.5"}, "val_fraction must be a number, got '0.5'"),
        "lora": ({"lora": {"rank": 2}}, "must be a LoraOptions, got dict"),
        "no image": (
            {"text_only": True, "lora": LoraOptions(parts=("vision_tower", "projector"))},
            "from which vision_tower, projector cannot learn",
        ),
        "lengths of old": ({"group_by_length": True}, "group_by_length needs the"),
        "no validation": ({"eval_strategy": "steps"}, "eval_dataset"),
    }.values():
        rows = [*short, {"messages": chat()}] if "text_only" in options else short
        with pytest.raises((TypeError, ValueError), match=said):
            train(model, processor, rows, folder / "out", image_folder=folder, **options)
        assert not (folder / "out").exists()
        after = {name: (type(module), module.training) for name, module in model.named_modules()}
        assert after == before
        assert not hasattr(model, "peft_config")
        assert all(parameter.requires_grad for parameter in model.parameters())
    done = train(
        *(model, processor, short, folder / "out"),
        image_folder=folder,
        max_steps=1,
        bf16=False,
    )
    assert done.steps == 1
