"""Ask a running vLLM server the demo's held-out questions, and compare with the library's answers.

    pitome-vlm serve demo --keep 0.25 --port 8000 --dtype float32 --max-model-len 400 &
    python -m scripts.serving.accuracy --url http://127.0.0.1:8000 --keep 0.25 -o accuracy_0.25

Give the same budget and algorithm as the server has. The server is compared with the library with
the same config (which has to agree) and the library's default, which tells the language model
about sizes and positions and which vLLM cannot have.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoProcessor, LlavaForConditionalGeneration

from pitome_vlm import MergeConfig
from pitome_vlm.demo import Sample, checkpoint_path, load_split
from pitome_vlm.measure.demo_benchmark import (
    ANSWER_TOKENS,
    Outcome,
    Setting,
    accuracy_interval,
    run,
)
from pitome_vlm.vllm import served_config

from ..command import command_line
from .load import chat, data_url, environment, httpx


def ask_server(url: str, samples: list[Sample], clients: int) -> tuple[list[str], list[int]]:
    """The server's answers and prompt lengths, in the order of the samples."""
    with httpx.Client(timeout=120) as client:
        model = client.get(f"{url}/v1/models").json()["data"][0]["id"]
        images = {one.scene_id: data_url(one.scene_id) for one in samples}

        def ask(sample: Sample) -> tuple[str, int]:
            body = chat(model, images[sample.scene_id], sample.question, ANSWER_TOKENS)
            del body["stream"], body["stream_options"]
            response = client.post(f"{url}/v1/chat/completions", json=body)
            response.raise_for_status()
            found = response.json()
            answer = found["choices"][0]["message"]["content"] or ""
            return answer.strip(), found["usage"]["prompt_tokens"]

        with ThreadPoolExecutor(clients) as pool:
            found = list(tqdm(pool.map(ask, samples), total=len(samples), desc="server"))
    return [answer for answer, _ in found], [length for _, length in found]


def ask_library(settings: list[Setting], samples: list[Sample]) -> list[Outcome]:
    """The library's answers in float32, whatever the server runs in."""
    path = checkpoint_path()
    model = LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(path)
    with tqdm(total=len(samples) * len(settings), desc="library") as bar:
        return run(model, processor, settings, samples, split="test", advance=bar.update)


def compare(answers: list[str], outcomes: list[Outcome], samples: list[Sample]) -> dict[str, Any]:
    """Accuracies, and the questions that server and library answer differently."""
    served = outcomes[0]
    right = np.array([given == one.answer for given, one in zip(answers, samples, strict=True)])
    different = [
        {
            "scene": sample.scene_id,
            "question": sample.question,
            "truth": sample.answer,
            "server": ours,
            "library": theirs,
        }
        for sample, ours, theirs in zip(samples, answers, served.answers, strict=True)
        if ours != theirs
    ]
    rows = [{"name": "vLLM server", "accuracy": 100.0 * float(right.mean())}]
    rows += [{"name": one.setting.name, "accuracy": one.accuracy} for one in outcomes]
    for row, correct in zip(rows, [right, *(one.correct for one in outcomes)], strict=True):
        row["interval"] = list(accuracy_interval(samples, correct))
    return {"rows": rows, "different": different, "questions": len(samples)}


def report(result: dict[str, Any]) -> str:
    """A table, and the questions that differ."""
    lines = ["| | accuracy (%) | 95 % interval |", "|---|---|---|"]
    for row in result["rows"]:
        low, high = row["interval"]
        lines.append(f"| {row['name']} | {row['accuracy']:.2f} | {low:.1f} to {high:.1f} |")
    count, total = len(result["different"]), result["questions"]
    lines += ["", f"{count} of {total} questions get another answer from the server than from the"]
    lines += ["library with the same config:" if count else "library with the same config."]
    for one in result["different"]:
        lines.append(
            f"- scene {one['scene']}, {one['question']!r} (truth {one['truth']!r}): server "
            f"{one['server']!r}, library {one['library']!r}"
        )
    machine, served = result["machine"], result["dtype"]
    precision = served if served == "float32" else f"server {served} and library float32"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines += ["", f"{machine['processor']}, {versions}, {precision}, greedy, {total} test "]
    lines[-1] += f"questions, {result['prompt_tokens']:.1f} prompt tokens on average."
    lines += ["", f"Command: `{result['command']}`"]
    return f"# Accuracy through a vLLM server, {result['config']}\n\n" + "\n".join(lines) + "\n"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--keep", type=float, required=True, help="the server's budget")
    parser.add_argument("--algorithm", default=None, help="the server's algorithm")
    parser.add_argument("--dtype", default="float32", help="the server's, for the report")
    parser.add_argument("--limit", type=int, default=None, help="first questions only")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("-o", "--output", required=True, help="without suffix: .md and .json")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    chosen = {"algorithm": options.algorithm} if options.algorithm else {}
    config = MergeConfig(keep=options.keep, **chosen)
    samples = load_split("test", options.limit)
    answers, lengths = ask_server(options.url.rstrip("/"), samples, options.clients)
    settings = [Setting("library, same config", served_config(config))]
    if config.keep != 1.0:
        settings.append(Setting("library, with calibration", config))
        settings.append(Setting("library, nothing merged", MergeConfig(keep=1.0)))
    result = compare(answers, ask_library(settings, samples), samples)
    result |= {
        "config": served_config(config).summary(),
        "prompt_tokens": float(np.mean(lengths)),
        "dtype": options.dtype,
        "machine": environment(),
        "command": command_line(),
    }
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_name(output.name + ".json").write_text(json.dumps(result, indent=2) + "\n")
    text = report(result)
    output.with_name(output.name + ".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
