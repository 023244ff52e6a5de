"""Retrieval and zero-shot classification of a CLIP or SigLIP with mteb, with and without merging.

    pip install ".[retrieval]"
    python -m scripts.encoders.mteb_eval --model openai/clip-vit-large-patch14 --ratio 0.95 \
        --tasks Flickr30kI2TRetrieval,Flickr30kT2IRetrieval --output out

The tasks are mteb's, by name; it loads their data. Reported are hit_rate_at_1/5/10, which is the
paper's R@k, accuracy for zero-shot classification, and the FLOPs of the image encoder.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mteb
import torch
from mteb.models.model_implementations.clip_models import CLIPModel, clip_vit_base_patch32

import pitome_vlm
from pitome_vlm.common import write_text
from pitome_vlm.measure.provenance import provenance
from pitome_vlm.measure.store import as_json
from pitome_vlm.merge.config import MergeConfig
from pitome_vlm.wrapping.wrap import make_config
from scripts.command import command_line
from scripts.encoders.retrieval_table import scores_of, table


def loaded(path: str, device: str | None = None) -> Any:
    """Mteb's wrapper around a checkpoint of transformers that has image and text features.

    Args:
        path: a folder or a name on the hub.
        device: None for the GPU, if there is one.

    Raises:
        TypeError: merging does not know its encoder.
    """
    model: Any = CLIPModel(path, revision=None, device=device)  # type: ignore[arg-type]
    model.model.eval()
    # Without it mteb takes the model for one of texts alone.
    name = path if path.count("/") == 1 else f"local/{Path(path).name}"
    about = {"name": name, "revision": None, "n_parameters": None, "embed_dim": None}
    model.mteb_model_meta = clip_vit_base_patch32.model_copy(update=about)
    with pitome_vlm.wrapped(model.model, keep=1.0):
        return model


def evaluated(
    model: Any, tasks: Iterable[Any], config: MergeConfig | None, batch: int
) -> list[Any]:
    """Scores of every task at one setting.

    Args:
        model: of `loaded`.
        tasks: of mteb.
        config: how to merge; None for the unmerged model.
        batch: images that are encoded together.

    Returns:
        Dictionaries as `retrieval_table.table` takes them.
    """
    options = MergeConfig(keep=1.0) if config is None else config
    found = []
    with pitome_vlm.wrapped(model.model, config=options), torch.no_grad():
        flops = pitome_vlm.describe(model.model).after.total_flops
        for task in tasks:
            result = mteb.evaluate(
                model,
                task,
                cache=None,
                co2_tracker=False,
                encode_kwargs={"batch_size": batch},
                show_progress_bar=False,
            )
            (scores,) = next(iter(result.task_results[0].scores.values()))
            found.append(
                {
                    "task": task.metadata.name,
                    "setting": "none" if config is None else config.summary(),
                    "scores": scores_of(scores),
                    "gflops": flops / 1e9,
                }
            )
    return found


def main(arguments: list[str] | None = None, tasks: list[Any] | None = None) -> list[Any]:
    """Evaluate, print the table, and write it.

    Args:
        arguments: of the command line, None for those of this process.
        tasks: tasks of mteb instead of those that `--tasks` names.
    """
    given = _parser(named=tasks is None).parse_args(arguments)
    budgets = {name: getattr(given, name) for name in ("ratio", "keep", "tokens")}
    budgets = {name: value for name, value in budgets.items() if value is not None}
    config = make_config(**budgets, algorithm=given.algorithm)
    model = loaded(given.model, given.device)
    chosen = tasks or list(mteb.get_tasks(tasks=[name.strip() for name in given.tasks.split(",")]))
    settings = [None, config] if given.baseline else [config]
    results = [one for own in settings for one in evaluated(model, chosen, own, given.batch)]
    shown = table(results)
    print(shown)
    if given.output is not None:
        setup = provenance(model.model, mteb=mteb.__version__, command=command_line())
        found = as_json({"setup": setup, "results": results})
        write_text(given.output / "results.json", found)
        write_text(given.output / "report.md", shown)
    return results


def _parser(*, named: bool) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, prog="scripts.encoders.mteb_eval")
    parser.add_argument("--model", required=True, help="folder or hub name of a CLIP or SigLIP")
    parser.add_argument("--tasks", required=named, help="names of mteb's tasks, with commas")
    parser.add_argument("--ratio", type=float, help="the paper's r, kept in every layer")
    parser.add_argument("--keep", type=float, help="fraction of the tokens that is left")
    parser.add_argument("--tokens", type=int, help="the same as a count")
    parser.add_argument("--algorithm", default="pitome", help="pitome (the paper's), tome, ...")
    parser.add_argument("--batch", type=int, default=32, help="images encoded together")
    parser.add_argument("--device", help="cpu or cuda; default: the GPU, if there is one")
    parser.add_argument(
        "--no-baseline", dest="baseline", action="store_false", help="leave the unmerged model out"
    )
    parser.add_argument("--output", type=Path, help="folder for results.json and report.md")
    return parser


if __name__ == "__main__":
    main()
