"""The demo's scenes, questions, splits, processor, checkpoint and training script."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from demo_fingerprint import fingerprint
from PIL import Image

from pitome_vlm import demo
from pitome_vlm.demo import dataset, drawing, processor, questions, scenes, structured
from pitome_vlm.measure import demo_benchmark

ROOT = Path(__file__).resolve().parents[2]
SINGULAR = {plural: noun for noun, plural in questions.PLURALS.items()}


@pytest.fixture(scope="module")
def test_samples() -> list[demo.Sample]:
    return demo.load_split("test")


@pytest.fixture(scope="module")
def structured_samples() -> list[demo.Sample]:
    return demo.load_split("structured_val")


def test_another_process_gets_the_same_data_without_torch() -> None:
    code = (
        "import sys; from demo_fingerprint import fingerprint; print(fingerprint());"
        "assert 'torch' not in sys.modules"
    )
    paths = f"{ROOT}:{ROOT / 'tests' / 'support'}"
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": paths, "PYTHONHASHSEED": "7", "PATH": ""},
    )
    assert found.stdout.strip() == fingerprint()


def mentioned(scene: scenes.Scene, words: list[str]) -> list[scenes.SceneObject]:
    """Objects that a phrase means, worked out from its words alone."""
    found = list(scene.objects)
    for word in words:
        noun = SINGULAR.get(word, word)
        if word in scenes.COLOURS:
            found = [o for o in found if o.colour == word]
        elif word in scenes.SIZES:
            found = [o for o in found if o.size == word]
        elif noun in (*scenes.SHAPES, "number"):
            found = [o for o in found if o.shape == noun]
        else:
            assert noun == "object", word
    return found


def phrases(text: str) -> list[list[str]]:
    """Runs of words that can only be parts of object phrases."""
    nouns = {*questions.PLURALS, *SINGULAR}
    naming = {*scenes.COLOURS, *scenes.SIZES, *nouns}
    text = text.lower().rstrip("?")
    for lead in ("which number is", "how big is"):
        text = text.removeprefix(lead)
    found: list[list[str]] = [[]]
    for word in text.split():
        if word in naming:
            found[-1].append(word)
        elif found[-1]:
            found.append([])
    return [run for run in found if run and run[-1] in nouns]


def recount(scene: scenes.Scene, sample: demo.Sample) -> str:
    """The answer, worked out again from the scene and the text of the question."""
    text = sample.question.lower()
    meant = [mentioned(scene, words) for words in phrases(text)]
    first = meant[0]
    kind = sample.question_type
    if kind == "count":
        return questions.NUMBER_WORDS[len(first)]
    if kind == "exists":
        return "yes" if first else "no"
    if kind == "compare":
        gap = len(first) - len(meant[1])
        return "yes" if (gap > 0 if "more" in text else gap < 0) else "no"
    assert all(len(objects) == 1 for objects in meant), sample
    thing = first[0]
    if kind == "where":
        return ("top" if thing.y < 96 else "bottom") + ("-left" if thing.x < 96 else "-right")
    if kind == "number":
        return questions.NUMBER_WORDS[thing.digit]
    if kind == "relation":
        return relation(text, thing, meant[1][0])
    return {"colour": thing.colour, "shape": thing.shape, "size": thing.size}[kind]


def relation(text: str, a: scenes.SceneObject, b: scenes.SceneObject) -> str:
    sides = {"left": a.x < b.x, "right": a.x > b.x, "above": a.y < b.y, "below": a.y > b.y}
    asked = [side for side in sides if f" {side} " in text]
    if len(asked) == 2:
        return next(side for side in asked if sides[side])
    return "yes" if sides[asked[0]] else "no"


def test_answers_are_right(
    test_samples: list[demo.Sample], structured_samples: list[demo.Sample]
) -> None:
    for split, samples in (("test", test_samples), ("structured_val", structured_samples)):
        for sample in samples:
            assert recount(demo.scene(sample.scene_id, split), sample) == sample.answer, sample


def test_splits_are_large_and_even(test_samples: list[demo.Sample]) -> None:
    assert len(test_samples) == 2400
    assert len({s.scene_id for s in test_samples}) == 400
    kinds = Counter(s.kind for s in test_samples)
    types = Counter(s.question_type for s in test_samples)
    assert set(kinds) == set(scenes.KINDS)
    assert set(types) == set(questions.QUESTION_TYPES)
    assert min(kinds.values()) >= 350
    assert min(types.values()) >= 200


def test_structured_scenes_are_even_too(structured_samples: list[demo.Sample]) -> None:
    assert len(structured_samples) >= 2390
    kinds = Counter(s.kind for s in structured_samples)
    types = Counter(s.question_type for s in structured_samples)
    assert set(kinds) == set(structured.STRUCTURED_KINDS)
    assert set(types) == set(questions.QUESTION_TYPES)
    assert min(kinds.values()) >= 470
    assert min(types.values()) >= 260


def test_towers_are_piles_of_touching_blocks() -> None:
    for scene_id in range(0, 100, 5):
        scene = demo.scene(scene_id, "structured_test")
        assert scene.kind == "towers"
        blocks = [o for o in scene.objects if o.radius == scene.objects[0].radius]
        assert len(blocks) >= 2
        for block in blocks[:-1]:
            steps = {(abs(block.x - o.x), abs(block.y - o.y)) for o in blocks if o is not block}
            pitch = 2 * block.radius + 1
            assert {(0, pitch), (pitch, 0)} & steps, scene


def test_answers_are_balanced(test_samples: list[demo.Sample]) -> None:
    answers: dict[str, Counter[str]] = {}
    for sample in test_samples:
        answers.setdefault(sample.question_type, Counter())[sample.answer] += 1
    for name in ("exists", "compare"):
        assert answers[name]["yes"] == pytest.approx(answers[name]["no"], abs=6)
    for name, found in answers.items():
        # The most frequent answer is at most 1.5 times what an even spread would give.
        assert max(found.values()) <= 1.5 * found.total() / len(found), (name, found)


def test_splits_share_no_layout() -> None:
    hashes = {
        split: {scenes.layout_hash(demo.scene(i, split)) for i in range(400)}
        for split in dataset.SPLIT_SCENES
    }
    for one, other in itertools.combinations(hashes, 2):
        assert not hashes[one] & hashes[other], (one, other)
    assert {h % 8 for h in hashes["train"]} == {0, 1, 2, 3, 4, 5}
    for split in ("val", "structured_val"):
        assert {h % 8 for h in hashes[split]} == {6}
    for split in ("test", "structured_test"):
        assert {h % 8 for h in hashes[split]} == {7}


def test_layout_hash_ignores_order_and_background_only() -> None:
    scene = demo.scene(0, "test")
    shuffled = scenes.Scene(scene.kind, scene.background, scene.objects[::-1])
    fewer = scenes.Scene(scene.kind, scene.background, scene.objects[1:])
    assert scenes.layout_hash(shuffled) == scenes.layout_hash(scene)
    assert scenes.layout_hash(fewer) != scenes.layout_hash(scene)


def test_limit_gives_a_prefix(test_samples: list[demo.Sample]) -> None:
    assert demo.load_split("test", 17) == test_samples[:17]
    assert demo.load_split("val", 0) == []


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"split must be one of train, val, .* got 'dev'"):
        demo.load_split("dev")
    with pytest.raises(ValueError, match=r"scene_id must be in 0\.\.399 .* got 400"):
        demo.scene_image(400, "test")
    with pytest.raises(ValueError, match="limit must be None or at least 0, got -1"):
        demo.load_split("test", -1)
    with pytest.raises(ValueError, match=r"size must be in 48\.\.4096, got 5000"):
        demo.scene_image(0, "test", 5000)
    with pytest.raises(ValueError, match=r"kind must be one of .* got 'busy'"):
        scenes.sample_scene(random.Random(0), "busy")
    with pytest.raises(ValueError, match=r"kind must be one of towers, .* got 'busy'"):
        structured.sample_structured(random.Random(0), "busy")
    with pytest.raises(ValueError, match=r"question_type must be one of .* got 'why'"):
        questions.questions_of_type(demo.scene(0, "test"), "why", random.Random(0))


@pytest.mark.parametrize("kind", [*scenes.KINDS, *structured.STRUCTURED_KINDS])
def test_every_kind_draws_inside_the_image(kind: str) -> None:
    sample = scenes.sample_scene if kind in scenes.KINDS else structured.sample_structured
    for seed in range(30):
        scene = sample(random.Random(seed), kind)
        assert 1 <= len(scene.objects) <= scenes.MAX_OBJECTS
        seen = drawing.object_map(scene)
        assert set(np.unique(seen)) == set(range(len(scene.objects) + 1))
        for o in scene.objects:
            assert o.radius <= min(o.x, o.y)
            assert max(o.x, o.y) + o.radius < scenes.CANONICAL_SIZE
            assert (o.digit is not None) == (o.shape == scenes.NUMBER)


def test_identical_scenes_have_touching_equal_blocks() -> None:
    for scene_id in range(1, 60, 6):
        scene = demo.scene(scene_id, "test")
        assert scene.kind == "identical"
        a, b = scene.objects[:2]
        assert (a.shape, a.colour, a.radius) == (b.shape, b.colour, b.radius)
        gaps = [max(abs(a.x - o.x), abs(a.y - o.y)) for o in scene.objects[1:]]
        assert min(gaps) == 2 * a.radius + 1


def test_larger_images_show_the_same_scene() -> None:
    small, large = demo.scene_image(0, "test"), demo.scene_image(0, "test", 768)
    assert small.size == (192, 192)
    assert large.size == (768, 768)
    shrunk = np.asarray(large.resize((24, 24), Image.Resampling.BOX), float)
    assert np.abs(shrunk - np.asarray(small.resize((24, 24), Image.Resampling.BOX))).mean() < 6


def test_vocabulary_covers_questions_and_answers(test_samples: list[demo.Sample]) -> None:
    words = processor.vocabulary()
    for sample in test_samples:
        processor.encode_question(sample.question, words)
        assert sample.answer in words


def test_processor_round_trip(tmp_path: Path) -> None:
    built = processor.build_processor()
    built.save_pretrained(tmp_path)
    loaded = transformers.AutoProcessor.from_pretrained(tmp_path)
    image = demo.scene_image(3, "test")
    turns = [
        {"role": "system", "content": [{"type": "text", "text": "Please look."}]},
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": "What color is the star?"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        {"role": "user", "content": [{"type": "text", "text": "How big is the star?"}]},
    ]
    text = loaded.apply_chat_template(turns, add_generation_prompt=True)
    inputs = loaded(text=text, images=image, return_tensors="pt")
    words = processor.vocabulary()
    lead = [words[w] for w in ("<s>", "please", "look", ".", "user:")]
    body = [words[w] for w in ("what", "colour", "is", "the", "star", "?")]
    ids = inputs["input_ids"][0].tolist()
    start = ids.index(processor.IMAGE)
    assert ids[:start] == lead
    assert ids[start : start + 144] == [processor.IMAGE] * 144
    assert ids[start + 144 :][:6] == body
    assert ids[-1] == words["assistant:"]
    assert ids.count(processor.EOS) == 1
    shrunk = image.resize((120, 120), Image.Resampling.BICUBIC)
    expected = np.asarray(shrunk, np.float32).transpose(2, 0, 1) / 127.5 - 1
    assert np.abs(inputs["pixel_values"][0].numpy() - expected).max() < 0.05


def test_checkpoint_is_small_and_answers() -> None:
    path = demo.checkpoint_path()
    assert sum(f.stat().st_size for f in path.rglob("*")) <= 12 * 1024 * 1024
    assert not list(path.rglob("*.bin"))
    loaded = transformers.AutoProcessor.from_pretrained(path)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
    samples = demo.load_split("val", 40)
    (batch,) = demo_benchmark.batches(loaded, samples, "val", 40)
    answers = demo_benchmark.ask(model, loaded, batch)
    right = sum(given == s.answer for given, s in zip(answers, samples, strict=True))
    assert right >= 28, f"{right} of 40 right"


def test_packed_questions_equal_questions_asked_alone(tmp_path: Path) -> None:
    from scripts.training.demo_model import build, data, language, packing

    torch.manual_seed(0)
    model = build.build_model(2, 32, 2, 32).eval()
    heads = language.LanguageHeads(32, 1)
    data.build_part("val", 0, 3, tmp_path, 4)
    arrays = data.Arrays.load(tmp_path)
    features = language.Features(model.model.vision_tower, arrays)
    scene_ids = np.arange(3)
    with torch.no_grad():
        packed = packing.pack(arrays, scene_ids, None, None)
        together, _ = language.run(model, heads, features(scene_ids), packed)
        alone = []
        for row, scene_id in zip(
            packed.question.tolist(), packed.answer_at[0].tolist(), strict=True
        ):
            start, length, _, _ = arrays.questions[row]
            question = arrays.tokens[start : start + length].tolist()
            ids = [*packing.prefix(None), *question, processor.vocabulary()[processor.ASSISTANT]]
            pixels = language.to_pixels(arrays.images[[scene_id]])
            alone.append(model(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0, -1])
    assert torch.allclose(together.logits, torch.stack(alone), atol=2e-2)
    assert torch.equal(together.logits.argmax(-1), torch.stack(alone).argmax(-1))


@pytest.mark.slow
def test_smoke_training_makes_a_loadable_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scripts.training.demo_model", "all", "--smoke"]
    command += ["--folder", str(tmp_path), "--port", "29655"]
    subprocess.run(command, check=True, timeout=240, cwd=ROOT)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "checkpoint")
    assert model.config.vision_config.num_hidden_layers == 2
    assert "Accuracy on test" in (tmp_path / "checkpoint" / "README.md").read_text()
