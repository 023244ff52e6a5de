"""Data that reaches the workers of a loader, however their processes are started."""

from __future__ import annotations

import multiprocessing
import pickle

import numpy as np
import pytest
from checkpoint import save_checkpoint
from PIL import Image
from training_data import records, write_lines

import pitome_vlm
from pitome_vlm.training import LoraOptions, from_dataset, from_records, open_conversations, train

CHAT = [{"role": "user", "content": "what is it ?"}, {"role": "assistant", "content": "circle"}]


def sources(folder):
    """Data of every kind, with images in every form."""
    import datasets

    rows = records(folder, 4)
    file = write_lines(folder / "train.jsonl", rows)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4), "red").save(folder / "turned.tif", exif=exif)
    ramp = np.linspace(0, 255, 128).reshape(4, 8, 4).astype(np.uint8)
    clear = Image.fromarray(ramp).quantize(8)
    content = (folder / "turned.tif").read_bytes()
    images = [clear, Image.open(folder / "turned.tif"), content, {"bytes": content}, str(file)]
    images[-1] = {"bytes": None, "path": rows[0]["image"]}
    several = [{"images": images, "messages": CHAT}] * 4
    table = datasets.Dataset.from_dict(
        {"image": [clear.convert("RGBA")] * 4, "messages": [CHAT] * 4}
    )
    paths = datasets.Dataset.from_dict(
        {"image": [str(folder / "turned.tif")] * 4, "messages": [CHAT] * 4}
    )
    table.save_to_disk(str(folder / "saved"))
    yield "file", open_conversations(file)
    yield "records", from_records(several, image_folder=folder)
    yield "dataset", from_dataset(table)
    yield "chosen rows", from_dataset(table.select([3, 1, 2, 0]))
    yield "paths", from_dataset(paths)
    yield "saved dataset", open_conversations(folder / "saved")
    text = datasets.Dataset.from_dict({"messages": [CHAT] * 4})
    yield "text only", from_dataset(text, text_only=True)


def test_what_arrives_in_a_worker_is_what_was_sent(tmp_path):
    for name, data in sources(tmp_path):
        for part in (data, *data.split(0.5), data.split(0.5)[0].split(0.5)[1]):
            there = pickle.loads(pickle.dumps(part))
            assert there.fingerprint == part.fingerprint
            assert there.conversations == part.conversations
            for index in range(len(part)):
                sent, arrived = part[index].images, there[index].images
                assert len(sent) == len(arrived), name
                for one, other in zip(sent, arrived, strict=True):
                    assert one.size == other.size, name
                    assert one.tobytes() == other.tobytes(), name


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_training_with_workers(tmp_path, method):
    folder = save_checkpoint(tmp_path / "model")
    file = write_lines(tmp_path / "train.jsonl", records(tmp_path, 8))
    data = open_conversations(file).split(0.5)[0]
    before = multiprocessing.get_start_method(allow_none=True)
    losses = []
    for workers in (0, 2):
        model, processor = pitome_vlm.load(folder, tokens=16, dtype="float32")
        multiprocessing.set_start_method(method, force=True)
        try:
            done = train(
                model,
                processor,
                data,
                tmp_path / f"out{workers}",
                lora=LoraOptions(rank=2),
                max_steps=2,
                per_device_train_batch_size=2,
                logging_steps=1,
                bf16=False,
                dataloader_num_workers=workers,
            )
        finally:
            multiprocessing.set_start_method(before, force=True)
        losses.append([entry["loss"] for entry in done.history if "loss" in entry])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2
