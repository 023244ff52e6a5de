"""The script that answers a file of questions with Ray Data gives the library's answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from served_models import environment

import pitome_vlm
from pitome_vlm.loading import load_image
from pitome_vlm.measure.asking import answers, encoded, question_prompt

pytest.importorskip("ray", reason="make test-vllm-old builds an environment with Ray")

ROOT = Path(__file__).resolve().parents[3]


def test_ray_data_answers_as_the_library_does(questions, tmp_path):
    rows = [
        {"image": one["images"][0], "question": text_of(one["prompt"]), "more": number}
        for number, one in enumerate(questions[:6])
    ]
    asked, answered = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--questions", str(asked), "--output", str(answered), "--keep", "0.25"]
    words += ["--dtype", "float32", "--max-model-len", "400", "--max-tokens", "8"]
    done = subprocess.run(
        [sys.executable, "-m", "scripts.serving.ray_batch", *words],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in answered.read_text().splitlines()]
    assert [{name: one[name] for name in rows[0]} for one in found] == rows
    model, processor = pitome_vlm.load("demo", dtype="float32", keep=0.25)
    expected = []
    for row in rows:
        prompt = question_prompt(processor, row["question"])
        batch = encoded(processor, [prompt], [load_image(row["image"])])
        expected += answers(model, processor, batch, max_new_tokens=8)
    assert [one["answer"] for one in found] == [one.strip() for one in expected]
    assert len(set(expected)) >= 2


def text_of(prompt: str) -> str:
    return prompt.removeprefix("user: <image> ").removesuffix(" assistant:")
