"""`pitome-vlm eval`: sweeps, their statistics, reports, suites and published numbers."""

from __future__ import annotations

import csv
import dataclasses
import json
import multiprocessing
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import sweep_stand_in as stand_in
import yaml
from absent import hide
from scipy import stats
from typer.testing import CliRunner

from pitome_vlm import MergeConfig
from pitome_vlm.cli import app
from pitome_vlm.lmms.samples import question_score, question_scores, questions, task_metrics
from pitome_vlm.measure.evaluate import published, suites
from pitome_vlm.measure.evaluate.records import Folder
from pitome_vlm.measure.evaluate.report_pages import write_report

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("report.md", "report.html")
PLOTS = ("accuracy_tokens.png",)


def report_files(folder: Path, failures=None, *, plots=False) -> dict[str, bytes]:
    write_report(stand_in.wanted(), Folder(folder), stand_in.RUN, failures or {}, plots=plots)
    return {name: (folder / name).read_bytes() for name in (*PAGES, *(PLOTS if plots else ()))}


# --- sweeps: resume, failures, identity


def test_a_sweep_killed_in_the_middle_resumes_to_the_report_of_an_undisturbed_one(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert stand_in.sweep(whole, resume=False) == {}
    # Forked, because a new interpreter would import torch first.
    process = multiprocessing.get_context("fork").Process(target=stand_in.slow_sweep, args=(cut,))
    process.start()
    deadline = time.monotonic() + 60
    while len(list((cut / "cells").glob("*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in (cut / "cells").glob("*.json")}
    assert 3 <= len(before) < len(stand_in.wanted())

    measured = []

    def evaluate(cell):
        measured.append(cell)
        return stand_in.measure(cell)

    assert stand_in.sweep(cut, resume=True, evaluate=evaluate) == {}
    assert len(measured) == len(stand_in.wanted()) - len(before)
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    assert report_files(cut) == report_files(whole)


def test_a_failing_cell_is_named_kept_apart_and_tried_again(tmp_path):
    bad = stand_in.wanted()[2]

    def evaluate(cell):
        if cell == bad:
            raise RuntimeError("document 7: no | image")
        return stand_in.measure(cell)

    events = []
    failures = stand_in.sweep(tmp_path, resume=False, evaluate=evaluate, tell=events.append)
    assert failures == {bad: "RuntimeError: document 7: no | image"}
    assert [event.kind for event in events if event.kind != "start"].count("failed") == 1
    assert len(Folder(tmp_path).store) == len(stand_in.wanted()) - 1
    assert "document 7" in Folder(tmp_path).failure(bad).read_text()
    report = report_files(tmp_path, failures)["report.md"].decode()
    assert "## Failed" in report
    assert bad.name in report
    assert r"no \| image" in report

    assert stand_in.sweep(tmp_path, resume=True) == {}
    assert not Folder(tmp_path).failure(bad).exists()
    undisturbed = tmp_path / "undisturbed"
    stand_in.sweep(undisturbed, resume=False)
    assert report_files(tmp_path) == report_files(undisturbed)


def test_processes_that_work_together_stop_at_the_first_failure(tmp_path):
    def evaluate(cell):
        raise RuntimeError("broken")

    wanted = stand_in.wanted()
    with pytest.raises(RuntimeError, match="broken"):
        stand_in.run_sweep(
            wanted, wanted, evaluate, Folder(tmp_path), stand_in.RUN, stop_at_failure=True
        )


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("batch_size", 8, "batch_size was 4, is 8"),
        ("limit", 10, "limit was None, is 10"),
        ("versions", {"pitome-vlm": "1"}, "versions.pitome-vlm was '0', is '1'"),
        ("checkpoint", "sha256:1", "checkpoint was 'sha256:0'"),
    ],
)
def test_resume_refuses_cells_measured_otherwise(tmp_path, field, value, said):
    stand_in.sweep(tmp_path, resume=False)
    other = {**stand_in.RUN, field: value}
    with pytest.raises(ValueError, match=re.escape(said)):
        stand_in.pending(stand_in.wanted(), Folder(tmp_path), other, resume=True)
    with pytest.raises(FileExistsError, match="10 finished cells; --resume"):
        stand_in.pending(stand_in.wanted(), Folder(tmp_path), stand_in.RUN, resume=False)


def test_what_was_cleared_is_measured_again(tmp_path):
    stand_in.sweep(tmp_path, resume=False)
    folder, wanted = Folder(tmp_path), stand_in.wanted()
    other = {**stand_in.RUN, "batch_size": 8}
    folder.clear()
    assert not list(tmp_path.rglob("*.json"))
    assert stand_in.pending(wanted, folder, other, resume=False) == wanted


def test_damaged_or_foreign_files_are_refused_by_name(tmp_path):
    stand_in.sweep(tmp_path, resume=False)
    folder, cell = Folder(tmp_path), stand_in.wanted()[0]
    path = folder.store.path(cell.file)
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=re.escape(str(path))):
        Folder(tmp_path).load(cell)
    path.write_text(whole.replace('"format": 1', '"format": 99', 1))
    with pytest.raises(ValueError, match="format must be 1"):
        Folder(tmp_path).load(cell)
    path.write_text(whole)
    folder.questions(cell.task).write_text("{}")
    with pytest.raises(ValueError, match="does not belong to the questions"):
        Folder(tmp_path).load(cell)


def test_changed_questions_are_a_failure_not_a_comparison(tmp_path):
    def evaluate(cell):
        measured = stand_in.measure(cell)
        if cell == stand_in.wanted()[1]:
            measured.questions[0] = dataclasses.replace(measured.questions[0], target="no")
        return measured

    failures = stand_in.sweep(tmp_path, resume=False, evaluate=evaluate)
    assert list(failures) == [stand_in.wanted()[1]]
    assert "the questions differ" in failures[stand_in.wanted()[1]]


# --- what tasks say about a question


@pytest.mark.parametrize(
    ("value", "score"),
    [
        (1.0, 1.0),
        (True, 1.0),
        (0.6, 0.6),
        ({"question_id": "a", "category": "OCR", "score": 1.0}, 1.0),
        ({"pred": "B. a cat", "answer": "B"}, 1.0),
        ({"pred": "Bat", "answer": "B"}, 0.0),
        ({"prediction": "c", "answer": "C"}, 1.0),
        ({"question_id": 3, "answer": "x"}, None),
        ("text", None),
    ],
)
def test_scores_of_single_questions(value, score):
    assert question_score(value) == score


def test_samples_become_questions():
    doc = {"imageId": "n1", "category": "colour"}
    common = {"doc": doc, "target": ["red"], "doc_hash": "h", "filtered_resps": ["red"]}
    samples = [{"doc_id": i, "exact_match": float(i), **common} for i in range(2)]
    first = questions(samples)[0]
    assert (first.cluster, first.group, first.target) == ("n1", "colour", "red")
    assert question_scores(samples, ["other", "exact_match"]) == [0.0, 1.0]
    assert question_scores(samples, ["submission"]) is None
    results = {"alias": "x", "exact_match,none": 0.5, "exact_match_stderr,none": 0.1}
    assert task_metrics(results) == {"exact_match": 0.5}


# --- the report


def test_the_report_holds_what_was_measured_and_fetches_nothing(tmp_path):
    stand_in.sweep(tmp_path, resume=False)
    files = report_files(tmp_path, plots=True)
    text, page = files["report.md"].decode(), files["report.html"].decode()
    for cell in stand_in.wanted():
        scores = np.array(stand_in.measure(cell).scores)
        base = np.array(stand_in.measure(suites.Cell(cell.task, suites.baseline())).scores)
        section = text.split(f"## Accuracy: {cell.task}")[1].split("##")[0]
        tokens = cell.setting.config.tokens or 576
        row = next(
            line
            for line in section.splitlines()
            if line.startswith(f"| {cell.setting.method} | {tokens} |")
        )
        assert f"| {100 * scores.mean():.1f} |" in row
        if cell.setting.method != "none":
            assert f"| {100 * (scores.mean() - base.mean()):+.1f} |" in row
            test = stats.binomtest(int((scores < base).sum()), int((scores != base).sum()))
            shown = "<0.001" if test.pvalue < 0.001 else f"{test.pvalue:.3f}"
            assert f"| {shown} |" in row
    assert "one multiply-add is 2 flop" in text.lower()
    assert files["accuracy_tokens.png"].startswith(b"\x89PNG")
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)
    assert set(re.findall(r'src="([^"]{0,10})', page)) == {"data:image"}
    assert "prefers-color-scheme: dark" in page


def test_published_numbers_are_labelled_and_near(tmp_path):
    stand_in.sweep(tmp_path, resume=False)
    write_report(stand_in.wanted(), Folder(tmp_path), stand_in.RUN, {}, plots=False)
    text = (tmp_path / "report.md").read_text()
    section = text.split("## Published and measured: gqa")[1].split("\n## ")[0]
    assert "| pitome | 192 | exact_match |" in section
    assert "| PiToMe | ~183 | exact_match | 59.9 | -2.1 | LLaVA-1.5-7B | paper |" in section
    assert "measured here" in section
    assert "| copied |" in section
    assert "LLaVA-1.5-13B" not in section
    assert "Published and measured: counting" not in text
    write_report(
        stand_in.wanted(), Folder(tmp_path), stand_in.RUN, {}, plots=False, published=False
    )
    assert "Published and" not in (tmp_path / "report.md").read_text()


# --- published numbers and suites


def test_every_published_row_says_where_it_comes_from():
    rows = published.load_published()
    assert len(rows) > 800
    assert {row.provenance for row in rows} == set(published.PROVENANCES)
    table = {
        (r.method, r.benchmark): r.value
        for r in rows
        if r.source.endswith("Table 3") and r.model == "LLaVA-1.5-7B"
    }
    assert table["PiToMe", "GQA"] == 59.9
    assert table["none", "TextVQA"] == 46.0
    assert table["ToMe", "MME perception"] == 1412.4
    assert len({dataclasses.astuple(row) for row in rows}) == len(rows)


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("provenance", "hearsay", "provenance must be one of"),
        ("value", "101", "value must be in"),
        ("value", "many", "could not convert"),
        ("source", "", "source must not be empty"),
        ("tokens", "", "does not go with basis"),
        ("tokens_basis", "felt", "tokens_basis must be one of"),
    ],
)
def test_wrong_published_rows_are_named(tmp_path, column, value, said):
    source = published.FOLDER / "llava_model_zoo.csv"
    with source.open(newline="") as file:
        rows = list(csv.DictReader(file))
    rows[1][column] = value
    with (tmp_path / "x.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    with pytest.raises(ValueError, match=rf"x\.csv, line 3: .*{said}"):
        published.load_published(tmp_path)


@pytest.fixture(scope="module")
def task_manager():
    from lmms_eval.tasks import TaskManager

    from pitome_vlm.lmms import tasks_path

    return TaskManager("ERROR", include_path=[str(tasks_path())], model_name="pitome_llava")


def test_suites_are_lmms_eval_configs_of_known_tasks(task_manager):
    llava15 = ["192", "128", "64"]
    budgets = {
        "demo": ["72", "36", "18", "9"],
        "llava-next-peers": ["640", "320", "160"],
        "llava15-paper": llava15,
        "llava15-peers": llava15,
        "quick": llava15,
        "qwen25vl-ocr": ["keep=0.25", "keep=0.1"],
        "qwen3vl": ["keep=0.5", "keep=0.25", "keep=0.125"],
        "refcoco": llava15,
    }
    assert suites.available() == sorted(budgets)
    for name in suites.available():
        suite = suites.read_suite(name)
        assert set(suite.tasks) <= set(task_manager.all_subtasks), name
        assert [setting.budget for setting in suite.settings] == ["", *budgets[name]]
        assert (ROOT / "eval" / "suites" / f"{name}.yaml").samefile(suites.SUITES / f"{name}.yaml")


def test_suites_pass_through_lmms_evals_own_config_loader(monkeypatch):
    from unittest import mock

    from lmms_eval import __main__ as lmms_main

    from pitome_vlm.lmms.arguments import ModelArguments

    seen = []

    def capture(arguments):
        seen.append(arguments)
        return None, None

    monkeypatch.setattr(lmms_main, "cli_evaluate_single", capture)
    monkeypatch.setattr(lmms_main, "eval_logger", mock.MagicMock())
    for name in suites.available():
        file = str(suites.SUITES / f"{name}.yaml")
        monkeypatch.setattr(sys, "argv", ["lmms-eval", "--config", file])
        seen.clear()
        lmms_main.cli_evaluate(lmms_main.parse_eval_args()[1])
        assert [run.model for run in seen] == ["pitome_llava"] * len(seen)
        assert len(seen) == len(suites.read_suite(name).settings)
        from lmms_eval.utils import simple_parse_args_string

        for run, setting in zip(seen, suites.read_suite(name).settings, strict=True):
            given = ModelArguments.parse(simple_parse_args_string(run.model_args))
            # A preset arrives as a whole config, options as they were written.
            config = given.merging.get("config") or MergeConfig.from_dict(given.merging)
            assert config == setting.config


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": "llava_hf"}, "model must be pitome_llava"),
        ({"tasks": "gqa,,mme"}, "tasks must be names"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"model_args": "pretrained=x,tokens=0"}, "tokens must be"),
        ({"model_args": "pretrained"}, "must be key=value"),
        ({"model_args": "pretrained=x,pretrained=y"}, "given twice"),
    ],
)
def test_wrong_suites_are_refused(tmp_path, change, said):
    run = {"model": "pitome_llava", "model_args": "pretrained=x,tokens=8", "tasks": "gqa"}
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump([{**run, **change}]))
    with pytest.raises(ValueError, match=said) as caught:
        suites.read_suite(str(file))
    assert str(file) in str(caught.value)


def test_runs_of_a_suite_may_differ_in_merging_only(tmp_path):
    runs = [
        {"model": "pitome_llava", "model_args": f"pretrained={p},tokens=8", "tasks": "gqa"}
        for p in "xy"
    ]
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(runs))
    with pytest.raises(ValueError, match="may differ in merge options only"):
        suites.read_suite(str(file))


def test_grids_have_the_unreduced_model_once_and_every_method_at_every_budget():
    settings = suites.grid(["none", "pitome", "released", "random:seed=3"], [64, 192, 64])
    names = [setting.name for setting in settings]
    assert names == [
        "none",
        "pitome-192",
        "released-192",
        "random:seed=3-192",
        "pitome-64",
        "released-64",
        "random:seed=3-64",
    ]
    assert settings[2].config.to_dict()["energy"] == "elu"
    assert settings[3].config.seed == 3
    files = [cell.file for cell in suites.cells(["gqa"], settings)]
    assert len(set(files)) == len(files)
    assert all(re.fullmatch(r"[\w.=-]+", name) for name in files)


# --- the command


@pytest.fixture
def command(monkeypatch, task_manager):
    """Runs `pitome-vlm eval`; lmms-eval's index of 2000 tasks is built once for all tests."""
    from pitome_vlm.lmms import evaluation

    monkeypatch.setattr(evaluation, "TaskManager", lambda *a, **k: task_manager)
    return run_eval


def run_eval(*words):
    return CliRunner().invoke(app, ["eval", *map(str, words)])


WRONG = [
    ([], "give either --suite or --tasks"),
    (["--suite", "demo", "--tasks", "gqa"], "give either --suite or --tasks"),
    (["--suite", "dmeo"], "Did you mean 'demo'?"),
    (["--suite", "demo", "--algorithms", "pitom"], "unknown method 'pitom'. Did you mean"),
    (["--suite", "demo", "--algorithms", "pitome,,tome"], "algorithms must be separated"),
    (["--suite", "demo", "--algorithms", "pitome:enrgy=elu"], "Did you mean 'energy'?"),
    (["--suite", "demo", "--algorithms", "pitome:energy=x"], "energy must be one of"),
    (["--suite", "demo", "--algorithms", "pitome:keep=0.5"], "got 'keep=0.5'"),
    (["--suite", "demo", "--tokens", "0"], "tokens must be whole numbers of at least 1, got '0'"),
    (["--suite", "demo", "--tokens", "12.5"], "got '12.5'"),
    (["--suite", "demo", "--tokens", "500"], "500"),
    (["--suite", "demo", "--limit", "0"], "limit must be at least 1, got 0"),
    (["--suite", "demo", "--limit", "0.5"], "--limit"),
    (["--suite", "demo", "--batch-size", "0"], "batch_size must be at least 1, got 0"),
    (["--suite", "demo", "--model", "/no/such/folder"], "/no/such/folder"),
    (["--suite", "demo", "--model-args", "keep=0.5,tokens=9"], "keep is set by the sweep"),
    (["--suite", "demo", "--model-args", "pretrained=x"], "pretrained is given by --model"),
    (["--suite", "demo", "--model-args", "dtpye=float16"], "Did you mean 'dtype'?"),
    (["--suite", "demo", "--model-args", "dtype"], "must be key=value"),
    (["--suite", "demo", "--include-path", "/no/such"], "include_path must be a folder"),
    (["--tasks", "demo_vqa", "--tokens", "36"], "model must be given"),
    (["--tasks", "demo_vqa", "--model", "demo"], "tokens must be given for pitome"),
    (["--tasks", "demo_vqaa", "--model", "demo", "--tokens", "36"], "Did you mean 'demo_vqa'?"),
    (["--tasks", "vqav2", "--model", "demo", "--tokens", "36"], "vqav2 is a group"),
]


@pytest.mark.parametrize(("words", "said"), WRONG)
def test_wrong_arguments_end_in_one_line_and_code_2(command, tmp_path, words, said):
    result = command(*words, "--output", tmp_path / "out")
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if not line.endswith("lmms-eval ...")]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert said in lines[0]
    assert not (tmp_path / "out").exists()


def test_missing_packages_are_named_before_anything_is_measured(command, monkeypatch, tmp_path):
    words = ["--suite", "demo", "--output", tmp_path]
    with monkeypatch.context() as patch:
        hide(patch, "matplotlib")
        result = command(*words)
    assert result.exit_code == 2
    assert 'pip install ".[viz]"' in result.stderr
    hide(monkeypatch, "lmms_eval")
    result = command(*words)
    assert result.exit_code == 2
    assert 'pip install ".[eval]"' in result.stderr
    (both,) = command("--suite", "dmeo").stderr.splitlines()
    assert "Did you mean 'demo'?" in both
    assert 'pip install ".[eval]"' in both


@pytest.fixture(scope="module")
def small_sweep(task_manager, tmp_path_factory):
    """A sweep of four questions in which ToMe fails at first, and its continuation."""
    from pitome_vlm.lmms import evaluation
    from pitome_vlm.wrapping.wrap import is_wrapped, schedule_of

    folder = tmp_path_factory.mktemp("sweep")
    words = ["--suite", "demo", "--algorithms", "tome", "--tokens", "36", "--limit", "4"]
    words += ["--batch-size", "4", "--no-published", "--output", folder]
    answer = evaluation.PitomeLlava.generate_until

    def broken(self, requests):
        if is_wrapped(self.model) and schedule_of(self.model).tokens_out == 36:
            raise RuntimeError("document 3 cannot be answered")
        return answer(self, requests)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "TaskManager", lambda *a, **k: task_manager)
        patch.setattr(evaluation, "TIMED_ROUNDS", 1)
        with patch.context() as once:
            once.setattr(evaluation.PitomeLlava, "generate_until", broken)
            first = run_eval(*words)
        page = (folder / "report.md").read_text()
        return folder, first, page, run_eval(*words, "--resume")


def test_a_cell_that_fails_is_named_and_does_not_end_the_sweep(small_sweep):
    folder, first, page, _ = small_sweep
    assert first.exit_code == 1, first.output
    assert "[2/2] demo_vqa tome-36: FAILED: RuntimeError: document 3 cannot be" in first.stderr
    assert "1 of 2 cells failed: demo_vqa tome-36" in first.stderr
    assert "document 3 cannot be answered" in page
    assert not list(folder.glob("failed/*"))


def test_resume_measures_what_is_missing_and_completes_the_report(small_sweep):
    folder, _, _, second = small_sweep
    assert second.exit_code == 0, second.output
    assert "2 cells, 1 finished already" in second.stderr
    assert second.stderr.count("% right") == 1
    for name in ("report.md", "report.html", "accuracy_tokens.png", "accuracy_time.png"):
        assert f"{folder / name}\n" in second.stdout
    page = (folder / "report.md").read_text()
    assert "document 3" not in page
    timed = json.loads((folder / "timing.json").read_text())["milliseconds"]
    assert set(timed) == {"none", "tome-36"}
    for name, one in timed.items():
        assert f"{one['median']:.1f}" in page, name


@pytest.mark.slow
def test_eval_measures_names_what_failed_and_repairs_it(command, monkeypatch, tmp_path):
    from pitome_vlm.demo import checkpoint_path, load_split
    from pitome_vlm.lmms import evaluation
    from pitome_vlm.loading.models import load
    from pitome_vlm.measure import demo_benchmark as benchmark
    from pitome_vlm.wrapping.wrap import is_wrapped, schedule_of

    words = ["--suite", "demo", "--algorithms", "pitome,tome", "--tokens", "36", "--limit", "8"]
    words += ["--batch-size", "8", "--no-published", "--output", tmp_path]
    monkeypatch.setattr(evaluation, "TIMED_ROUNDS", 2)
    answer = evaluation.PitomeLlava.generate_until

    def broken(self, requests):
        merged = is_wrapped(self.model) and schedule_of(self.model).tokens_out == 36
        if merged and self.engine.model.__dict__["_pitome"].config.algorithm == "tome":
            raise RuntimeError("document 3 cannot be answered")
        return answer(self, requests)

    monkeypatch.setattr(evaluation.PitomeLlava, "generate_until", broken)
    first = command(*words)
    assert first.exit_code == 1, first.output
    assert "demo_vqa tome-36: FAILED: RuntimeError: document 3 cannot be answered" in first.stderr
    assert "1 of 3 cells failed: demo_vqa tome-36" in first.stderr
    assert "## Failed" in (tmp_path / "report.md").read_text()

    monkeypatch.setattr(evaluation.PitomeLlava, "generate_until", answer)
    again = command(*words)
    assert again.exit_code == 2
    assert "--resume" in again.stderr
    assert "--overwrite" in again.stderr
    second = command(*words, "--resume")
    assert second.exit_code == 0, second.output
    assert second.stderr.count("% right") == 1
    report = (tmp_path / "report.md").read_text()
    assert "## Failed" not in report
    assert (tmp_path / "accuracy_time.png").exists()

    model, processor = load(checkpoint_path(), dtype="float32")
    settings = [
        benchmark.Setting(cell.setting.name, cell.setting.config)
        for cell in suites.cells(["demo_vqa"], suites.grid(["pitome", "tome"], [36]))
    ]
    samples = load_split("test", 8)
    outcomes = benchmark.run(model, processor, settings, samples, split="test", batch_size=8)
    for outcome in outcomes:
        stored = json.loads((tmp_path / f"cells/demo_vqa--{outcome.setting.name}.json").read_text())
        assert stored["answers"] == outcome.answers
        assert stored["results"]["exact_match"] == pytest.approx(outcome.accuracy / 100)
        assert stored["facts"]["visual_tokens"] == outcome.tokens
        assert stored["identity"]["merging"]["tokens"] == outcome.setting.config.tokens

    # Nothing left to do: no model is loaded, the report is the same.
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "PitomeLlava", None)
        third = command(*words, "--resume")
    assert third.exit_code == 0, third.output
    assert (tmp_path / "report.md").read_text() == report

    fourth = command(*words, "--overwrite")
    assert fourth.exit_code == 0, fourth.output
    assert fourth.stderr.count("% right") == 3
