"""What LoRA wins back at a harsh budget, on the bundled model: train, ask, write the table.

    python -m scripts.training.lora --output eval/results/lora

Draws training scenes that the model has not seen, trains adapters with merging on (LoRA, and QLoRA
on nf4), asks all held-out questions before and after, and writes results.json (every answer) and
report.md. Two processes of one thread each. `--split val` is for choosing options; the committed
table is the test split. What is finished in --work is not done again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import pitome_vlm
from pitome_vlm import MergeConfig
from pitome_vlm.demo import checkpoint_path, load_split
from pitome_vlm.demo.dataset import SPLIT_SCENES
from pitome_vlm.demo.drawing import draw_scene
from pitome_vlm.demo.questions import QUESTION_TYPES, Question, questions_of_type
from pitome_vlm.demo.scenes import KINDS, Scene, layout_hash, sample_scene
from pitome_vlm.measure.demo_benchmark import Setting, run
from pitome_vlm.measure.provenance import provenance

from .lora_report import rewrite_report, write_report

TOKENS = 16
# The buckets of layouts that the demo's dataset leaves to training (its module docstring).
TRAIN_BUCKETS = range(6)
NONE = MergeConfig(keep=1.0, algorithm="none")
PAPER = MergeConfig.preset("paper", tokens=TOKENS)
DEFAULT = MergeConfig(tokens=TOKENS)
BATCH = 48


@dataclass(frozen=True)
class Trial:
    """One adapter (or none), and the settings it is asked under.

    Attributes:
        name: of its folder and in tables.
        bits: "" or "nf4".
        trained: merging in training; None trains nothing.
        asked: merging in use.
    """

    name: str
    bits: str
    trained: MergeConfig | None
    asked: tuple[MergeConfig, ...]


TRIALS = (
    Trial("base", "", None, (NONE, PAPER, DEFAULT)),
    Trial("lora", "", PAPER, (PAPER,)),
    Trial("lora-default", "", DEFAULT, (DEFAULT,)),
    Trial("lora-unmerged", "", NONE, (NONE, PAPER)),
    Trial("base-nf4", "nf4", None, (NONE, PAPER)),
    Trial("qlora-nf4", "nf4", PAPER, (PAPER,)),
)


def fresh_scene(number: int, seed: int) -> Scene:
    """A training scene that is in no split: another seed, a layout that belongs to training."""
    kind = KINDS[number % len(KINDS)]
    attempt = 0
    while True:
        rng = random.Random(f"demo-lora/{seed}/{number}/{attempt}")
        scene = sample_scene(rng, kind)
        if layout_hash(scene) % 8 in TRAIN_BUCKETS:
            return scene
        attempt += 1


def ask_about(scene: Scene, rng: random.Random, count: int, asked: Counter[str]) -> list[Question]:
    """Some questions about a scene, of the types asked least so far."""
    pools = {name: questions_of_type(scene, name, rng) for name in QUESTION_TYPES}
    chosen: list[Question] = []
    while len(chosen) < count and any(pools.values()):
        names = [name for name in QUESTION_TYPES if pools[name]]
        rng.shuffle(names)
        name = min(names, key=lambda n: asked[n])
        question = min(pools[name], key=lambda q: asked[f"{q.type} {q.answer}"])
        pools[name].remove(question)
        asked[name] += 1
        asked[f"{question.type} {question.answer}"] += 1
        chosen.append(question)
    rng.shuffle(chosen)
    return chosen


def draw_data(folder: Path, scenes: int, per_scene: int, seed: int) -> Path:
    """A LLaVA-format file with its images in a folder; drawn once."""
    file = folder / f"train-{scenes}x{per_scene}-{seed}.jsonl"
    if file.is_file():
        return file
    images = folder / f"images-{seed}"
    images.mkdir(parents=True, exist_ok=True)
    asked: Counter[str] = Counter()
    lines = []
    for number in range(scenes):
        scene = fresh_scene(number, seed)
        path = images / f"{number}.png"
        if not path.is_file():
            draw_scene(scene).save(path)
        rng = random.Random(f"demo-lora/questions/{seed}/{number}")
        turns = list(turns_of(ask_about(scene, rng, per_scene, asked)))
        record = {"id": number, "image": f"{images.name}/{path.name}", "conversations": turns}
        lines.append(json.dumps(record))
    part = file.with_suffix(".part")
    part.write_text("\n".join(lines) + "\n")
    part.replace(file)
    return file


def turns_of(questions: list[Question]) -> Iterator[dict[str, str]]:
    """Questions and answers as LLaVA writes them down."""
    for index, question in enumerate(questions):
        mark = "<image>\n" if index == 0 else ""
        yield {"from": "human", "value": mark + question.text}
        yield {"from": "gpt", "value": question.answer}


def load(trial: Trial, merging: MergeConfig) -> tuple[Any, Any]:
    return pitome_vlm.load(
        checkpoint_path(),
        config=merging,
        dtype="float32",
        device_map="cpu",
        load_in_4bit=trial.bits == "nf4",
    )


def train(trial: Trial, options: argparse.Namespace, data: Path) -> Path | None:
    """The trial's adapter, trained unless it is there already."""
    from pitome_vlm.training import LoraOptions
    from pitome_vlm.training import train as fit

    if trial.trained is None:
        return None
    folder: Path = options.work / f"{trial.name}-{options.key}"
    if (folder / "adapter_model.safetensors").is_file():
        return folder
    model, processor = load(trial, trial.trained)
    begin = time.time()
    result = fit(
        model,
        processor,
        data,
        folder,
        lora=LoraOptions(rank=options.rank, alpha=2.0 * options.rank),
        resume=folder.exists(),
        learning_rate=options.learning_rate,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        seed=options.seed,
        logging_steps=20,
        bf16=False,  # or the result would depend on what the hardware multiplies
    )
    print(f"{trial.name}: {result.steps} steps in {time.time() - begin:.0f} s", file=sys.stderr)
    (folder / "seconds.json").write_text(json.dumps({"seconds": round(time.time() - begin)}))
    return folder


def measure(job: tuple[Trial, argparse.Namespace, Path]) -> dict[str, Any]:
    """Train one trial and ask all questions; in a process of its own."""
    trial, options, data = job
    torch.set_num_threads(1)
    adapter = train(trial, options, data)
    if adapter is None:
        model, processor = load(trial, NONE)
    else:
        model, processor = pitome_vlm.load(adapter)
    pitome_vlm.unwrap(model)
    samples = load_split(options.split, options.limit)
    settings = [Setting(trial.name, config) for config in trial.asked]
    with torch.no_grad():
        outcomes = run(model, processor, settings, samples, split=options.split, batch_size=BATCH)
    print(f"{trial.name}: asked {len(samples)} questions", file=sys.stderr)
    return {
        "trial": trial.name,
        "bits": trial.bits,
        "trained": trial.trained and trial.trained.to_dict(),
        "seconds": json.loads((adapter / "seconds.json").read_text())["seconds"] if adapter else 0,
        "adapter_bytes": adapter
        and sum(f.stat().st_size for f in adapter.glob("adapter_model.safetensors")),
        "weights": asdict(pitome_vlm.describe(model).weights),
        "facts": provenance(
            model,
            split=options.split,
            questions=len(samples),
            scenes=SPLIT_SCENES[options.split],
            batch_size=BATCH,
        ),
        "outcomes": [
            {
                "config": outcome.setting.config.to_dict(),
                "tokens": outcome.tokens,
                "accuracy": round(outcome.accuracy, 3),
                "answers": outcome.answers,
            }
            for outcome in outcomes
        ],
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of table and answers")
    parser.add_argument("--work", type=Path, default=Path("/tmp/pitome-demo-lora"))
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--limit", type=int, help="first questions only")
    parser.add_argument("--trials", help="names, separated by commas; all by default")
    parser.add_argument("--scenes", type=int, default=4000)
    parser.add_argument("--per-scene", type=int, default=4, help="questions in a conversation")
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--fresh", action="store_true", help="forget what is in --work")
    parser.add_argument("--rewrite", action="store_true", help="the page again, without a run")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    names = options.trials.split(",") if options.trials else [trial.name for trial in TRIALS]
    unknown = set(names) - {trial.name for trial in TRIALS}
    if unknown:
        raise SystemExit(f"unknown trials: {', '.join(sorted(unknown))}")
    if options.rewrite:
        rewrite_report(options.output)
        return
    if options.fresh:
        shutil.rmtree(options.work, ignore_errors=True)
    options.work.mkdir(parents=True, exist_ok=True)
    options.key = (
        f"{options.scenes}x{options.per_scene}x{options.epochs:g}-b{options.batch_size}"
        f"-lr{options.learning_rate:g}-r{options.rank}-s{options.seed}"
    )
    data = draw_data(options.work, options.scenes, options.per_scene, options.seed)
    jobs = [(trial, options, data) for trial in TRIALS if trial.name in names]
    # Spawned: torch's threads do not survive a fork.
    with multiprocessing.get_context("spawn").Pool(min(options.jobs, len(jobs))) as pool:
        results = pool.map(measure, jobs, chunksize=1)
    recipe = {
        name: getattr(options, name)
        for name in ("scenes", "per_scene", "epochs", "batch_size", "learning_rate", "rank", "seed")
    }
    write_report(options.output, load_split(options.split, options.limit), results, recipe)


if __name__ == "__main__":
    main()
