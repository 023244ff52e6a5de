r"""Ask vLLM servers the demo's held-out questions, and compare with the library's answers.

    python -m scripts.serving.accuracy --keep 0.5 0.25 --tokens 18 -o eval/results/serving/accuracy

Every budget is served twice, calibrated and not, one server after the other; rows that the output
already has are not measured again. The library answers in float32 in this process; where a server
answers something else, it is asked again with noise in the last bits of the pixels, which tells
ties within rounding from mistakes.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoProcessor, LlavaForConditionalGeneration

from pitome_vlm import MergeConfig, wrapped
from pitome_vlm.common import read_json, write_text
from pitome_vlm.demo import Sample, checkpoint_path, load_split, scene_image
from pitome_vlm.measure.asking import encoded, question_prompt
from pitome_vlm.measure.demo_benchmark import (
    ANSWER_TOKENS,
    Setting,
    accuracy_interval,
    ask,
    run,
)

from ..command import command_line
from .client import chat, data_url, environment, httpx, server

SERVER = "--max-model-len 400 --max-num-seqs 16 --block-size 32 --max-num-batched-tokens 256"
OFF = {"size_bias": False, "positions": "compact"}
DRAWS = 64
# Pixel values go up to about two, where the last bit of a float32 is worth 2e-7.
NOISE = (1e-7, 1e-6)


def ask_server(url: str, samples: list[Sample], clients: int) -> list[str]:
    """The server's answers, in the order of the samples."""
    with httpx.Client(timeout=120) as client:
        model = client.get(f"{url}/v1/models").json()["data"][0]["id"]
        images = {one.scene_id: data_url(one.scene_id) for one in samples}

        def answer(sample: Sample) -> str:
            body = chat(model, images[sample.scene_id], sample.question, ANSWER_TOKENS)
            del body["stream"], body["stream_options"]
            response = client.post(f"{url}/v1/chat/completions", json=body)
            response.raise_for_status()
            return (response.json()["choices"][0]["message"]["content"] or "").strip()

        with ThreadPoolExecutor(clients) as pool:
            return list(tqdm(pool.map(answer, samples), total=len(samples), disable=None))


class Library:
    """The library's answers in float32."""

    def __init__(self, samples: list[Sample]) -> None:
        path = checkpoint_path()
        model = LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
        self.model, self.processor = model.eval(), AutoProcessor.from_pretrained(path)
        self.samples = samples

    def answers(self, config: MergeConfig) -> list[str]:
        """Greedy answers to all questions."""
        (found,) = run(
            self.model, self.processor, [Setting("", config)], self.samples, split="test"
        )
        return found.answers

    def answers_under_noise(self, config: MergeConfig, sample: Sample) -> dict[str, int]:
        """How often the library gives which answer when the last bits of the pixels change."""
        generator = torch.Generator().manual_seed(0)
        prompt = question_prompt(self.processor, sample.question)
        one = encoded(self.processor, [prompt], [scene_image(sample.scene_id, "test")])
        batch = {name: value.repeat_interleave(DRAWS, 0) for name, value in one.items()}
        pixels = batch["pixel_values"]
        scale = torch.tensor(NOISE).repeat(DRAWS // len(NOISE))[:, None, None, None]
        batch["pixel_values"] = pixels + scale * torch.randn(pixels.shape, generator=generator)
        with wrapped(self.model, config=config):
            given = ask(self.model, self.processor, batch)
        return {answer: given.count(answer) for answer in sorted(set(given))}


def row(name: str, answers: list[str], samples: list[Sample]) -> dict[str, Any]:
    """Accuracy of some answers."""
    right = np.array([given == one.answer for given, one in zip(answers, samples, strict=True)])
    interval = accuracy_interval(samples, right)
    return {"name": name, "accuracy": 100.0 * float(right.mean()), "interval": list(interval)}


def different(
    served: list[str], own: list[str], config: MergeConfig, library: Library
) -> list[dict[str, Any]]:
    """The questions that server and library answer differently."""
    return [
        {
            "scene": sample.scene_id,
            "question": sample.question,
            "truth": sample.answer,
            "server": ours,
            "library": theirs,
            "library_under_noise": library.answers_under_noise(config, sample),
        }
        for sample, ours, theirs in zip(library.samples, served, own, strict=True)
        if ours != theirs
    ]


def measure(
    options: argparse.Namespace, library: Library, done: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """One entry for every budget, with calibration and without, and every dtype, but for `done`."""
    known = [(row["budget"], row["calibrated"], row["dtype"]) for row in done]
    budgets: list[dict[str, Any]] = [{"keep": keep} for keep in options.keep]
    budgets += [{"tokens": tokens} for tokens in options.tokens]
    for budget in budgets:
        for off in ({}, OFF):
            config = MergeConfig(**budget, **off)
            missing = [one for one in options.dtype if (budget, not off, one) not in known]
            own = library.answers(config) if missing else []
            for dtype in missing:
                words = [f"--{name}={value}" for name, value in budget.items()]
                words += [f"--option={name}={value}" for name, value in off.items()]
                words += ["--dtype", dtype, *shlex.split(options.vllm)]
                with server("demo", words, options.port) as (url, _):
                    served = ask_server(url, library.samples, options.clients)
                yield {
                    "budget": budget,
                    "calibrated": not off,
                    "dtype": dtype,
                    "server": row("vLLM", served, library.samples),
                    "library": row("library", own, library.samples),
                    "different": different(served, own, config, library),
                }


def report(result: dict[str, Any]) -> str:
    """A table, and the questions that differ."""
    lines = ["| | calibrated | dtype of the server | vLLM | library, float32 | other answers |"]
    lines.append("|---" * 6 + "|")
    whole = result["unmerged"]
    for one in result["rows"]:
        ((name, value),) = one["budget"].items()
        cells = [f"{name}={value:g}", "yes" if one["calibrated"] else "no", one["dtype"]]
        cells += [shown(one["server"]), shown(one["library"])]
        count = len(one["different"])
        decided = sum(entry["server"] in entry["library_under_noise"] for entry in one["different"])
        cells.append(f"{count}, {decided} of them ties" if count else "none")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"Accuracy in % (95 % interval), {result['questions']} test questions, greedy;"]
    lines[-1] += f" nothing merged, library: {shown(whole)}."
    lines += ["A tie is a question that the library, too, answers as the server did when noise of"]
    lines.append(f"{NOISE[0]:g} or {NOISE[1]:g} is added to the pixels ({DRAWS} draws).")
    for one in result["rows"]:
        if one["different"] and one["dtype"] == "float32":
            kind = "calibrated" if one["calibrated"] else "not calibrated"
            lines += ["", f"Other answers, {one['budget']}, {kind}, float32:", ""]
            lines += [
                f"- scene {entry['scene']}, {entry['question']!r} (truth {entry['truth']!r}): "
                f"server {entry['server']!r}, library {entry['library']!r}, under noise "
                f"{entry['library_under_noise']}"
                for entry in one["different"]
            ]
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines += ["", f"{machine['processor']}, {versions}.", "", f"Command: `{result['command']}`"]
    return "# Accuracy through a vLLM server\n\n" + "\n".join(lines) + "\n"


def shown(entry: dict[str, Any]) -> str:
    return "{:.2f} ({:.1f} to {:.1f})".format(entry["accuracy"], *entry["interval"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=float, nargs="*", default=[])
    parser.add_argument("--tokens", type=int, nargs="*", default=[])
    parser.add_argument("--dtype", nargs="+", default=["float32"], help="of the servers")
    parser.add_argument("--limit", type=int, default=None, help="first questions only")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--port", type=int, default=8767)
    parser.add_argument("--vllm", default=SERVER, help="options of vLLM's server, one string")
    parser.add_argument("-o", "--output", required=True, help="without suffix: .md and .json")
    options = parser.parse_args()
    library = Library(load_split("test", options.limit))
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    stored = output.with_name(output.name + ".json")
    earlier: dict[str, Any] = read_json(stored) if stored.exists() else {"rows": []}
    result: dict[str, Any] = {
        "command": command_line(),
        "machine": environment(),
        "questions": len(library.samples),
        "unmerged": row("", library.answers(MergeConfig(keep=1.0)), library.samples),
        "rows": earlier["rows"],
    }
    if earlier.get("questions", result["questions"]) != result["questions"]:
        raise SystemExit(f"{stored} is about {earlier['questions']} questions; use another output")
    for found in measure(options, library, list(result["rows"])):
        # After every one, because all of them take an hour.
        result["rows"].append(found)
        write_text(stored, json.dumps(result, indent=2) + "\n")
        write_text(output.with_name(output.name + ".md"), report(result))
    print(report(result))


if __name__ == "__main__":
    main()
