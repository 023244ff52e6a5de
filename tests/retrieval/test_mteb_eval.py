"""scripts/encoders/mteb_eval.py on tasks of our own in mteb's format, offline.

In an environment with mteb: `make test-retrieval`.
"""

from __future__ import annotations

import json

import mteb
import pytest
import tiny_clip_checkpoint
from datasets import Dataset, DatasetDict
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.abstasks.zeroshot_classification import AbsTaskZeroShotClassification
from PIL import Image

from scripts.encoders import mteb_eval

COLOURS = ("red", "blue", "green", "yellow", "black", "white")
IMAGES = [Image.new("RGB", (48, 48), name) for name in COLOURS]


def described(name, kind, category, **more):
    return TaskMetadata(
        name=name,
        description="Colours and their names.",
        reference=None,
        dataset={"path": "tiny", "revision": "1"},
        type=kind,
        category=category,
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        date=None,
        domains=[],
        task_subtypes=[],
        license=None,
        annotations_creators=None,
        dialect=[],
        modalities=["image", "text"],
        sample_creation=None,
        bibtex_citation="",
        **more,
    )


def two_sided(texts, images):
    words = Dataset.from_dict({"id": texts, "text": [f"a {name} image" for name in COLOURS]})
    return words, Dataset.from_dict({"id": images, "image": IMAGES})


class ImagesToTexts(AbsTaskRetrieval):
    metadata = described("TinyI2TRetrieval", "Any2AnyRetrieval", "i2t", main_score="ndcg_at_10")

    def load_data(self, **_):
        texts, images = ([f"{kind}{i}" for i in range(6)] for kind in "tp")
        corpus, queries = two_sided(texts, images)
        relevant = {image: {text: 1} for image, text in zip(images, texts, strict=True)}
        split = {
            "corpus": corpus,
            "queries": queries,
            "relevant_docs": relevant,
            "top_ranked": None,
        }
        self.dataset, self.data_loaded = {"default": {"test": split}}, True


class Colours(AbsTaskZeroShotClassification):
    metadata = described("TinyZeroShot", "ZeroShotClassification", "i2t", main_score="accuracy")

    def load_data(self, **_):
        rows = Dataset.from_dict({"image": IMAGES, "label": list(range(6))})
        self.dataset, self.data_loaded = DatasetDict({"test": rows}), True

    def get_candidate_labels(self):
        return [f"a {name} image" for name in COLOURS]


def test_scores_with_and_without_merging(tmp_path, capsys):
    path = tiny_clip_checkpoint.save(tmp_path / "clip")
    given = ["--model", path, "--ratio", "0.8", "--output", str(tmp_path / "out")]
    results = mteb_eval.main(given, [ImagesToTexts(), Colours()])
    assert [(one["task"], one["setting"]) for one in results] == [
        ("TinyI2TRetrieval", "none"),
        ("TinyZeroShot", "none"),
        ("TinyI2TRetrieval", "pitome ratio=0.8"),
        ("TinyZeroShot", "pitome ratio=0.8"),
    ]
    whole, _, merged, _ = results
    assert merged["gflops"] < whole["gflops"]
    assert set(whole["scores"]) == {"hit_rate_at_1", "hit_rate_at_5", "hit_rate_at_10"}
    # Six captions: ten of them hold the right one.
    assert whole["scores"]["hit_rate_at_10"] == merged["scores"]["hit_rate_at_10"] == 100
    assert set(results[1]["scores"]) == {"accuracy"}
    shown = capsys.readouterr().out
    assert "R@1" in shown
    assert (tmp_path / "out/report.md").read_text() in shown
    saved = json.loads((tmp_path / "out/results.json").read_text())
    assert saved["results"] == results
    assert saved["setup"]["mteb"] == mteb.__version__


def test_the_papers_tasks_are_known():
    names = ("Flickr30kI2TRetrieval", "Flickr30kT2IRetrieval", "Imagenet1kZeroShot")
    assert {task.metadata.name for task in mteb.get_tasks(tasks=list(names))} == set(names)


def test_options_are_checked_before_anything_is_evaluated(tmp_path):
    path = tiny_clip_checkpoint.save(tmp_path / "clip")
    with pytest.raises(ValueError, match="ratio must be in"):
        mteb_eval.main(["--model", path, "--ratio", "2"], [ImagesToTexts()])
