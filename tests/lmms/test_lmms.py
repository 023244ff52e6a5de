"""The lmms-eval plugin, with lmms-eval really installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import torch
from lmms_requests import QUARTER, SHORT, continuation, instance, library, question, texts

import pitome_vlm
from pitome_vlm.demo import checkpoint_path, load_split, scene_image
from pitome_vlm.lmms import manifests, tasks_path
from pitome_vlm.lmms.arguments import ModelArguments
from pitome_vlm.lmms.tasks import demo_vqa
from pitome_vlm.measure import demo_benchmark as benchmark
from pitome_vlm.measure.asking import question_prompt
from pitome_vlm.merge.config import MergeConfig
from pitome_vlm.wrapping.wrap import is_wrapped, merge_config

LIMIT = 13
PLAIN = MergeConfig(keep=1.0)


def evaluate(launcher, folder, *options):
    """lmms-eval in a process of its own: its output, results and answers by document."""
    env = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(folder / "hf"),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    command = [sys.executable, "-m", *launcher, "--model", "pitome_llava", "--tasks", "demo_vqa"]
    command += ["--model_args", f"pretrained={checkpoint_path()},keep=0.25"]
    command += ["--include_path", str(tasks_path()), "--limit", str(LIMIT), "--log_samples"]
    command += ["--output_path", str(folder / "out"), *options]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    shown = done.stdout + done.stderr
    assert done.returncode == 0, shown
    (results,) = (folder / "out").rglob("*_results.json")
    (samples,) = (folder / "out").rglob("*_samples_demo_vqa.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    return shown, json.loads(results.read_text()), {row["doc_id"]: row for row in rows}


@pytest.mark.slow
def test_command_line_equals_the_library(tmp_path):
    shown, results, rows = evaluate(["lmms_eval"], tmp_path, "--batch_size", "4")
    assert "|demo_vqa|none  |     0|exact_match" in shown
    expected = library(QUARTER, LIMIT)
    assert [rows[number]["filtered_resps"] for number in range(LIMIT)] == expected.answers
    scores = results["results"]["demo_vqa"]
    assert scores["exact_match,none"] == expected.correct.mean()
    samples = load_split("test", LIMIT)
    for kind, percent in benchmark.accuracy_by(samples, expected.correct, "question_type").items():
        assert scores[f"exact_match_{kind},none"] == pytest.approx(percent / 100)
    assert results["config"]["model_args"].endswith(",keep=0.25")
    assert results["throughput"]["avg_visual_tokens"] == 36
    for row in rows.values():
        (counts,) = row["token_counts"]
        assert 36 < counts["input_tokens"] < 36 + 25
        assert 1 <= counts["output_tokens"] <= 3


@pytest.mark.slow
def test_two_processes_answer_like_one(lm, tmp_path):
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "lmms_eval"]
    _, results, rows = evaluate(launcher, tmp_path, "--batch_size", "2")
    alone = lm.generate_until([question(number) for number in range(LIMIT)])
    assert len(rows) == LIMIT
    assert [rows[number]["filtered_resps"] for number in range(LIMIT)] == texts(alone)
    expected = [answer.token_counts.to_dict() for answer in alone]
    assert [rows[number]["token_counts"][0] for number in range(LIMIT)] == expected
    speed = results["throughput"]
    assert speed["avg_processes"] == 2
    # Both halves, and not the request that only keeps the processes in step.
    assert speed["total_gen_tokens"] == sum(counts["output_tokens"] for counts in expected)
    inputs = [counts["input_tokens"] for counts in expected]
    assert speed["avg_input_tokens"] == pytest.approx(sum(inputs) / LIMIT)


def test_registration():
    from lmms_eval.models import get_model

    points = entry_points(group="lmms_eval.models")
    assert "pitome_vlm.lmms:manifests" in [point.value for point in points]
    assert [manifest.model_id for manifest in manifests()] == ["pitome_llava"]
    assert get_model("pitome_llava").__name__ == "PitomeLlava"
    assert get_model("pitome_llava", force_simple=True).is_simple


def test_importing_the_entry_point_is_light():
    code = "import sys, pitome_vlm.lmms; sys.exit(bool({'torch', 'lmms_eval'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_task_data_is_the_held_out_split():
    rows = [json.loads(line) for line in demo_vqa.DATA.read_text().splitlines()]
    assert rows == demo_vqa.records()
    assert len(rows) == 2400


def test_task_functions(docs):
    doc = docs[0]
    (image,) = demo_vqa.doc_to_visual(doc)
    assert image.tobytes() == scene_image(doc["scene_id"], "test").tobytes()
    assert demo_vqa.doc_to_text(doc) == doc["question"]
    around = {"pre_prompt": "Look. ", "post_prompt": " Briefly."}
    assert demo_vqa.doc_to_text(doc, around) == f"Look. {doc['question']} Briefly."
    right = {"exact_match": 1.0, f"exact_match_{doc['question_type']}": 1.0}
    assert demo_vqa.process_results(doc, [f" {doc['answer'].upper()} "]) == right
    assert demo_vqa.process_results(doc, [f"{doc['answer']} x"])["exact_match"] == 0.0
    choices = demo_vqa.doc_to_choice(doc)
    assert choices[demo_vqa.doc_to_choice_index(doc)] == doc["answer"]


def test_batches_answer_like_single_requests(lm, docs):
    requests = [question(number) for number in range(12)]
    found = {}
    for size in (1, 4, 12):
        lm.arguments = ModelArguments.parse({"pretrained": "demo", "batch_size": size})
        found[size] = lm.generate_until(requests)
    assert found[1] == found[4] == found[12]
    assert lm.model.dtype == torch.float32
    assert sum(a == d["answer"] for a, d in zip(texts(found[1]), docs, strict=False)) > 6


def test_different_generation_options_are_not_mixed(lm):
    options = [SHORT if number % 2 else {"max_new_tokens": 1} for number in range(6)]
    mixed = lm.generate_until([question(n, options=o) for n, o in enumerate(options)])
    assert [result.token_counts.output_tokens for result in mixed][::2] == [1, 1, 1]
    assert texts(mixed)[1::2] == texts(lm.generate_until([question(n) for n in (1, 3, 5)]))


def test_token_counts_are_of_the_merged_sequence(lm):
    lm.reconfigure(None)
    whole = lm.generate_until([question(number) for number in range(4)])
    lm.reconfigure(MergeConfig(tokens=10))
    merged = lm.generate_until([question(number) for number in range(4)])
    for a, b in zip(whole, merged, strict=True):
        assert a.token_counts.input_tokens - b.token_counts.input_tokens == 144 - 10


@pytest.mark.slow
def test_evaluations_in_a_row_share_the_model(lm):
    expected = {}
    for config in (QUARTER, MergeConfig(tokens=20, algorithm="tome"), None):
        lm.reconfigure(config)
        assert is_wrapped(lm.model) == (config is not None)
        given = texts(lm.generate_until([question(number) for number in range(4)]))
        expected[config] = library(config or PLAIN, 4).answers
        lm.clean()
        assert given == expected[config]
    before = lm.model
    lm.reconfigure(QUARTER)
    assert lm.model is before
    with pytest.raises(ValueError, match="tokens"):
        lm.reconfigure(MergeConfig(tokens=999))
    assert merge_config(lm.model) == QUARTER


def test_first_inputs_and_seconds_are_those_of_an_evaluation(lm, monkeypatch):
    requests, given = [question(number) for number in range(3)], []
    generate = lm.model.generate
    monkeypatch.setattr(
        lm.model, "generate", lambda **inputs: given.append(inputs) or generate(**inputs)
    )
    assert lm.answering_seconds == 0
    lm.generate_until(requests)
    assert 0 < lm.engine.work.seconds < lm.answering_seconds
    inputs = lm.first_inputs(requests)
    assert {"input_ids", "attention_mask", "pixel_values"} <= set(inputs)
    for name, value in inputs.items():
        assert torch.equal(value, given[0][name]), name
    lm.reconfigure(None)
    assert lm.answering_seconds == 0


def test_throughput_is_reported_once_per_evaluation(lm):
    from lmms_eval.models.model_utils import gen_metrics

    gen_metrics.reset_logged_metrics()
    answers = lm.generate_until([question(0), question(1), question(1, __padding_only__=True)])
    lm.clean()
    lm.clean()
    (logged,) = gen_metrics.get_logged_metrics_history()
    tokens = [answer.token_counts for answer in answers[:2]]
    assert logged["total_requests"] == 2
    assert logged["total_gen_tokens"] == sum(count.output_tokens for count in tokens)
    assert logged["input_tokens"] == sum(count.input_tokens for count in tokens) / 2
    assert logged["visual_tokens"] == 36
    assert logged["total_elapsed_time"] > 0


@pytest.mark.parametrize("config", [QUARTER, None])
def test_likelihoods_equal_those_from_logits(simple_lm, docs, config):
    lm = simple_lm
    lm.reconfigure(config)
    said = [(n, word) for n in range(4) for word in ("red", "one", "top-left of the image")]
    found = lm.loglikelihood([continuation(n, f" {word}", docs) for n, word in said])
    for (number, words), (loss, greedy), result in zip(said, found, found, strict=True):
        prompt = question_prompt(lm.processor, docs[number]["question"])
        images = demo_vqa.doc_to_visual(docs[number])
        inputs = lm.processor(images=images, text=f"{prompt} {words}", return_tensors="pt")
        target = inputs["input_ids"][0, -len(words.split()) :]
        with torch.no_grad():
            logits = lm.model(**inputs).logits[0]
        assert result.token_counts.input_tokens == len(logits)
        logits = logits[-len(target) - 1 : -1].log_softmax(-1)
        expected = -logits[torch.arange(len(target)), target].sum()
        assert loss == pytest.approx(float(expected), abs=2e-4)
        assert greedy == bool((logits.argmax(-1) == target).all())


def test_likelihoods_with_different_numbers_of_images(simple_lm, docs):
    lm = simple_lm

    def request(number, count):
        visuals = [scene_image(scene, "test") for scene in range(count)]
        text = docs[number]["question"]
        return instance("loglikelihood", number, text, lambda doc: "yes", lambda doc: visuals)

    together = lm.loglikelihood([request(0, 2), request(1, 0), request(2, 1), request(3, 2)])
    for number, count in enumerate((2, 0, 1, 2)):
        (alone,) = lm.loglikelihood([request(number, count)])
        assert together[number][0] == pytest.approx(alone[0], abs=2e-4)


@pytest.mark.slow
def test_multiple_choice_through_lmms_eval(build):
    from argparse import Namespace

    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    lm = build(simple=True)
    manager = TaskManager(include_path=str(tasks_path()), include_defaults=False)
    results = simple_evaluate(
        model=lm,
        tasks=["demo_vqa_choice", "demo_vqa"],
        task_manager=manager,
        limit=12,
        batch_size=4,
        bootstrap_iters=0,
        cli_args=Namespace(process_with_media=False, reasoning_tags=None),
    )
    chosen = results["results"]["demo_vqa_choice"]["acc,none"]
    answered = results["results"]["demo_vqa"]["exact_match,none"]
    assert answered == library(QUARTER, 12).correct.mean()
    # The right one-word answer is among the choices, so nearly the same questions are right.
    assert chosen == pytest.approx(answered, abs=0.1)


def test_without_a_budget_the_checkpoint_decides(build, tmp_path):
    model, processor = pitome_vlm.load(checkpoint_path(), tokens=20, algorithm="tome")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    lm = build(pretrained=str(tmp_path), keep=None)
    assert merge_config(lm.model) == MergeConfig(tokens=20, algorithm="tome")
    assert not is_wrapped(build(keep=None).model)


def test_adapters_and_quantisation(build, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    base, processor = pitome_vlm.load(checkpoint_path(), dtype="float32")
    torch.manual_seed(0)
    config = LoraConfig(
        r=16, lora_alpha=256, target_modules=r".*language_model.*proj", init_lora_weights=False
    )
    adapted = get_peft_model(base, config).eval()
    adapted.save_pretrained(tmp_path)
    lm = build(peft=str(tmp_path))
    assert isinstance(lm.model, PeftModel)
    assert is_wrapped(lm.model)
    answers = lm.generate_until([question(number) for number in range(4)])
    assert all(36 < answer.token_counts.input_tokens < 61 for answer in answers)
    (batch,) = benchmark.batches(processor, load_split("test", 4), "test", 4)
    expected = benchmark.ask(pitome_vlm.wrap(adapted, config=QUARTER), processor, batch)
    assert texts(answers) == expected
    assert expected != library(QUARTER, 4).answers
    lm.reconfigure(None)
    assert not is_wrapped(lm.model)
    with pytest.raises(ValueError, match=r"peft=.*adapter_config.json"):
        build(peft=str(checkpoint_path()))
    small = build(load_in_4bit=True)
    assert len(small.generate_until([question(0), question(1)])) == 2


def test_system_prompt_and_large_images(lm):
    plain = texts(lm.generate_until([question(0)]))
    counts = lm.generate_until([question(0)])[0].token_counts.input_tokens
    lm.system_prompt = "Please look at this image carefully"
    assert lm.generate_until([question(0)])[0].token_counts.input_tokens == counts + 6
    lm.system_prompt = None
    lm.arguments = ModelArguments.parse({"pretrained": "demo", "max_pixels": 10**6})
    assert texts(lm.generate_until([question(0)])) == plain


def test_until_ends_an_answer(lm):
    (plain,) = lm.generate_until([question(3)])
    (cut,) = lm.generate_until([question(3, options={**SHORT, "until": [plain.text[-2:]]})])
    assert cut.text == plain.text[:-2]
