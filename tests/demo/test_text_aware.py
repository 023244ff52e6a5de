"""The text-aware reference: its greedy search, what it is handed, and its page."""

import argparse
import json
from itertools import product

import pytest
import torch

import pitome_vlm
from pitome_vlm import MergeConfig, algorithms
from pitome_vlm.demo import checkpoint_path, load_split
from pitome_vlm.measure.demo_benchmark import Setting, batches, run
from pitome_vlm.merge import registry
from pitome_vlm.merge.algorithm import MergeContext, make_plan
from scripts.demo import text_aware, text_selection
from scripts.demo.report import RECOMMENDED, raw, setting_values
from scripts.demo.stored import CHANGES
from scripts.demo.text_selection import Asked, TextOptions, kernel_of, most_likely


def determinant(rows):
    """By expansion along the first row."""
    if not rows:
        return 1.0
    minors = ([row[:place] + row[place + 1 :] for row in rows[1:]] for place in range(len(rows)))
    return sum(
        (-1) ** place * rows[0][place] * determinant(minor) for place, minor in enumerate(minors)
    )


def slow_choice(kernel, n_out):
    """Every set of one more token, and the one of the largest determinant."""
    chosen = []
    for _ in range(n_out):
        left = [i for i in range(len(kernel)) if i not in chosen]
        sets = {i: [*chosen, i] for i in left}
        chosen.append(
            max(left, key=lambda i: determinant([[kernel[a][b] for b in sets[i]] for a in sets[i]]))
        )
    return chosen


def drawn(seed, n_tokens, channels):
    """Projected tokens and words of two questions, the second one word shorter."""
    generator = torch.Generator().manual_seed(seed)
    visual = torch.randn(2, n_tokens, channels, generator=generator)
    words = torch.randn(2, 3, channels, generator=generator)
    attention = torch.rand(2, n_tokens, generator=generator)
    known = torch.tensor([[True] * 3, [False, True, True]])
    return Asked(visual, words, known, lambda layer: (attention, attention.square())[layer])


def test_the_greedy_search_finds_the_largest_determinants():
    options = [TextOptions(name) for name in text_selection.RELEVANCES]
    options += [TextOptions("words", weight=weight) for weight in (0.0, 0.5, 0.9)]
    for seed, option in product(range(4), options):
        asked = drawn(seed, n_tokens=7, channels=9)
        kernel = kernel_of(asked, option)
        found = most_likely(kernel, 5)
        for row in range(2):
            assert found[row].tolist() == slow_choice(kernel[row].tolist(), 5), (seed, option)


def test_more_tokens_than_channels_are_still_distinct():
    kernel = kernel_of(drawn(0, n_tokens=20, channels=4), TextOptions("none"))
    chosen = most_likely(kernel, 20)
    assert chosen.sort(1).values.tolist() == [list(range(20))] * 2


def test_the_kernel_is_that_of_relevance_and_cosines():
    asked = drawn(1, n_tokens=6, channels=5)
    kernel = kernel_of(asked, TextOptions("words"))
    for row, known in enumerate(asked.of_question.tolist()):
        of_question = [w for w, used in zip(asked.words[row], known, strict=True) if used]
        relevance = [
            sum(float(torch.cosine_similarity(v, w, 0)) for w in of_question) / len(of_question)
            for v in asked.visual[row]
        ]
        low, high = min(relevance), max(relevance)
        scaled = [max(1e-6, (r - low) / (high - low)) for r in relevance]
        for i, j in product(range(6), repeat=2):
            cosine = float(torch.cosine_similarity(asked.visual[row, i], asked.visual[row, j], 0))
            expected = scaled[i] * cosine * scaled[j]
            assert float(kernel[row, i, j]) == pytest.approx(expected, abs=1e-5)


def test_without_relevance_the_words_change_nothing():
    asked = drawn(2, n_tokens=6, channels=5)
    blind = kernel_of(asked, TextOptions("none"))
    torch.testing.assert_close(kernel_of(asked, TextOptions("words", weight=0.0)), blind)
    torch.testing.assert_close(blind.diagonal(0, 1, 2), torch.ones(2, 6).double())


def test_it_works_for_questions_that_were_handed_over_alone():
    keys = torch.randn(2, 6, 4)
    with pytest.raises(ValueError, match="is not handed the questions"):
        make_plan(text_selection.ALGORITHM, keys, 3, ctx=MergeContext(config=MergeConfig(keep=0.5)))
    assert text_selection.NAME not in registry.names()


@pytest.fixture
def registered(monkeypatch):
    """The reference among the algorithms, for one test."""
    monkeypatch.setattr(registry, "_known", dict(registry._known))
    algorithms.register(text_selection.ALGORITHM)


def test_every_question_gets_tokens_of_its_own(registered, monkeypatch):
    path = checkpoint_path()
    model, processor = pitome_vlm.load(path, dtype="float32")
    # Three questions about one image.
    samples = load_split("val", 3)
    assert len({one.scene_id for one in samples}) == 1
    seen = {}
    search = text_selection.most_likely
    monkeypatch.setattr(
        text_selection,
        "most_likely",
        lambda kernel, n_out: seen.setdefault(len(seen), search(kernel, n_out)),
    )
    settings = [
        Setting(name, MergeConfig.from_dict({"tokens": 18, "algorithm": "text_aware", **options}))
        for name, options in (("blind", {"relevance": "none"}), ("words", {}))
    ]

    def answers(*inputs):
        return text_selection.answers(*inputs, path=path)

    outcomes = run(model, processor, settings, samples, split="val", answers_of=answers)
    assert [one.tokens for one in outcomes] == [18, 18]
    blind, words = seen.values()
    assert len({tuple(row) for row in blind.tolist()}) == 1
    assert len({tuple(row) for row in words.tolist()}) == 3
    assert text_selection.HANDED.get(None) is None
    batch = next(batches(processor, samples, "val", 3))
    asked = text_selection.asked_of(text_selection.unreduced_model(path), batch)
    length = [len(one.question.replace("?", " ?").split()) for one in samples]
    assert asked.of_question.sum(1).tolist() == length
    assert asked.visual.shape == (3, 144, 160)


def test_the_page_says_what_the_question_adds(registered, tmp_path):
    """As after a run in which only the last layer's attention is right, and once not."""
    samples = load_split("val", 24)
    outcomes = []
    for one in text_aware.settings():
        right = "layer" not in one.name or "last" in one.name
        answers = [sample.answer if right else "" for sample in samples]
        if one.name == text_aware.BLIND:
            answers[0] = ""
        values = {"changes": len(CHANGES), "tokens": one.budget or 144, "answers": answers}
        outcomes.append(setting_values(one) | values)
    other = outcomes[1] | {"method": "ToMe"}
    facts = {"split": "val", "questions": 24, "checkpoint": "sha256:1"}
    later = [facts | {"rows": ["ToMe"]}, facts | {"rows": ["ToMe", RECOMMENDED]}]
    costs = {"costs": [1], "times": [2]}
    results = raw(samples, [*outcomes, other], costs, {"provenance": facts, "later": later})
    known = tmp_path / "results.json"
    known.write_text(json.dumps(results))
    wanted = argparse.Namespace(split="val", limit=24, known=known)
    old = text_aware.started(wanted, tmp_path / "val.json", "sha256:1")
    assert [one["method"] for one in old["outcomes"]] == [one["method"] for one in outcomes]
    assert [one["rows"] for one in old["later"]] == [[RECOMMENDED]]
    page = text_aware.report(old)
    section = page.split("## What the question adds")[1].split("##")[0]
    lines = {line.split(" | ")[0]: line for line in section.splitlines()}
    assert lines["| text-aware: last layer"].count("| +4.2 (") == 3
    assert lines["| text-aware: second layer"].count("| -95.8 (") == 3
    assert "the 18 of them hold together" in section
    with pytest.raises(SystemExit, match="made with another model"):
        text_aware.started(wanted, tmp_path / "val.json", "sha256:2")


@pytest.mark.slow
def test_the_command_asks_all_rows_and_resumes(registered, tmp_path, monkeypatch):
    words = ["text_aware", "--output", str(tmp_path), "--limit", "6", "--jobs", "1"]
    monkeypatch.setattr("sys.argv", words)
    monkeypatch.setattr(text_aware, "command_line", lambda: "this test")
    text_aware.main()
    stored = tmp_path / "val.json"
    first = json.loads(stored.read_text())
    assert len(first["outcomes"]) == len(text_aware.settings())
    assert "command this test" in (tmp_path / "val.md").read_text()
    text_aware.main()
    assert json.loads(stored.read_text()) == first
