"""What a wrapped model writes about itself into the folder that it is saved to, and to the hub."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import FAMILIES
from huggingface_hub import ModelCard
from huggingface_hub.errors import RepositoryNotFoundError
from tiny import tiny_batch, tiny_model
from tiny_encoders import TINY
from transformers import LlavaForConditionalGeneration

import pitome_vlm
from pitome_vlm.merge.config import CONFIG_NAME
from pitome_vlm.wrapping import card as cards
from pitome_vlm.wrapping.wrap import is_wrapped

OWN = "---\nlicense: mit\n---\n\n# Mine\n\nAll mine.\n"


def saved(folder, **options) -> str:
    pitome_vlm.wrap(tiny_model(), **options).save_pretrained(folder)
    return (folder / "README.md").read_text()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_the_card_says_what_is_merged_and_how_to_load_it(family, tmp_path):
    model, _ = family()
    pitome_vlm.wrap(model, keep=0.25, algorithm="tome").save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    said = (
        "tome keep=0.25",
        "| algorithm | tome |",
        "not measured",
        "pitome_vlm.load(",
        CONFIG_NAME,
    )
    for words in (*said, "visual tokens per", "Loaded with transformers alone"):
        assert words in text, words
    assert ModelCard.load(tmp_path / "README.md").data["tags"] == ["pitome-vlm", "token-merging"]


def test_an_encoder_has_a_card_too(tmp_path):
    pitome_vlm.wrap(TINY["clip"].build(), keep=0.5, algorithm="tome").save_pretrained(tmp_path)
    assert "tome keep=0.5, 37 -> 19 visual tokens" in (tmp_path / "README.md").read_text()


def test_plain_transformers_load_the_unmerged_model_as_the_card_says(tmp_path):
    text = saved(tmp_path, tokens=36)
    assert "tokens=36, 144 -> 36 visual tokens per image" in text
    plain = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert not is_wrapped(plain)
    batch = tiny_batch()
    assert torch.equal(plain(**batch).logits, tiny_model()(**batch).logits)


def test_what_people_wrote_stays_and_saving_again_replaces_the_section(tmp_path):
    (tmp_path / "README.md").write_text(OWN)
    text = saved(tmp_path, tokens=36)
    assert text.startswith(OWN)
    (tmp_path / "README.md").write_text(text + "\nWritten later.\n")
    text = saved(tmp_path, tokens=18, algorithm="pool")
    assert text.startswith(OWN)
    assert text.count("Written later.") == text.count("Merged visual tokens") == 1
    assert "144 -> 18" in text
    assert "144 -> 36" not in text


def test_no_card_of_other_processes_and_of_unwrapped_models(tmp_path):
    model = pitome_vlm.wrap(tiny_model(), tokens=36)
    model.save_pretrained(tmp_path / "second", is_main_process=False)
    assert not (tmp_path / "second/README.md").exists()
    pitome_vlm.unwrap(model).save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain/README.md").exists()


def test_the_card_names_no_folder_of_the_machine(tmp_path):
    saved(tmp_path / "first", tokens=36)
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "first")
    pitome_vlm.wrap(model, tokens=36).save_pretrained(tmp_path / "second")
    text = (tmp_path / "second/README.md").read_text()
    assert "| base model | `first` |" in text
    assert str(tmp_path) not in text


def test_a_push_keeps_the_card_of_the_hub_and_adds_the_section(monkeypatch):
    pushed = {}

    class Hub:
        def create_repo(self, repo_id, **options):
            return type("Url", (), {"repo_id": repo_id})()

        def upload_folder(self, *, repo_id, folder_path, **options):
            pushed.update({p.name: p.read_bytes() for p in Path(folder_path).iterdir()}, to=repo_id)
            return options["commit_message"]

    load, on_hub = ModelCard.load, {"me/old": OWN}

    def from_hub(name, **options):
        if name in on_hub:
            return ModelCard(on_hub[name])
        if not Path(name).is_file():
            response = type("R", (), {"headers": {}, "request": None, "status_code": 404})()
            raise RepositoryNotFoundError("none", response=response)
        return load(name, **options)

    monkeypatch.setattr(cards, "HfApi", Hub)
    monkeypatch.setattr(cards.ModelCard, "load", from_hub)
    model = pitome_vlm.wrap(tiny_model(), tokens=36)
    assert model.push_to_hub("me/old", commit_message="hi", tags=["mine"]) == "hi"
    written = pushed["README.md"].decode()
    assert {"to", CONFIG_NAME, "config.json", "model.safetensors"} <= pushed.keys()
    for words in ("license: mit", "All mine.", "144 -> 36", "- mine"):
        assert words in written, words
    assert model.push_to_hub("me/new") == "Upload model"
    assert "144 -> 36" in pushed["README.md"].decode()
