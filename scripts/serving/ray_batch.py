r"""Answer a file of questions with Ray Data, merging in every copy of the model.

    python -m scripts.serving.ray_batch --model PATH --questions questions.jsonl --keep 0.25 \
        --copies 4 -o answers.jsonl

Every line of the questions has "image" (a path or an address) and "question"; every line of the
answers adds "answer", in the order of the questions. Needs `pip install "ray[data]"` next to vLLM
0.27, the release that Ray pins. On more than one machine `--wheel` names the wheel of this package
(`make wheel`), which every worker installs.
"""

from __future__ import annotations

import argparse
import base64
import json
import mimetypes
from pathlib import Path
from typing import Any

import ray
import torch
from ray.data.llm import build_processor, vLLMEngineProcessorConfig

from pitome_vlm import MergeConfig
from pitome_vlm.common import write_text
from pitome_vlm.demo import checkpoint_path
from pitome_vlm.vllm import hf_overrides

# Ray would set a core aside for every stage around the model, and wait for ever where there are too
# few.
SHARED = {"num_cpus": 0.1}


def answer(rows: list[dict[str, Any]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows with their answers, in order."""
    numbered = [
        {"number": number, "url": address(row["image"]), "question": row["question"]}
        for number, row in enumerate(rows)
    ]
    data = ray.data.from_items(numbered)
    found = processor(options)(data).take_all()
    answers = {one["number"]: one["answer"] for one in found}
    return [row | {"answer": answers[number]} for number, row in enumerate(rows)]


def processor(options: argparse.Namespace) -> Any:
    """Copies of the model that Ray feeds."""
    path = str(checkpoint_path()) if options.model == "demo" else options.model
    engine = {
        "hf_overrides": hf_overrides(MergeConfig(keep=options.keep), path),
        "limit_mm_per_prompt": {"image": 1},
        "max_model_len": options.max_model_len,
        "dtype": options.dtype,
    }
    settings: dict[str, Any] = {}
    if not torch.cuda.is_available():
        # Ray would wait for a GPU.
        settings["placement_group_config"] = {"bundles": [{"CPU": 0.5}]}
        engine["enforce_eager"] = True
    if options.wheel:
        settings["runtime_env"] = {"pip": [options.wheel]}
    config = vLLMEngineProcessorConfig(
        model_source=path,
        engine_kwargs=engine,
        # Engine metrics go through Ray Serve, which is not needed otherwise.
        log_engine_metrics=False,
        prepare_multimodal_stage={"enabled": True, **SHARED},
        chat_template_stage={"enabled": True, **SHARED},
        tokenize_stage={"enabled": True, **SHARED},
        detokenize_stage={"enabled": True, **SHARED},
        concurrency=options.copies,
        batch_size=options.batch_size,
        **settings,
    )
    return build_processor(
        config,
        preprocess=lambda row: {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": row["url"]}},
                        {"type": "text", "text": row["question"]},
                    ],
                }
            ],
            "sampling_params": {"temperature": 0, "max_tokens": options.max_tokens},
            # As in the prompts that the bundled model was trained on.
            "tokenization_kwargs": {"add_special_tokens": True},
        },
        postprocess=lambda row: {"number": row["number"], "answer": row["generated_text"].strip()},
        preprocess_map_kwargs=SHARED,
        postprocess_map_kwargs=SHARED,
    )


def address(image: str) -> str:
    """An image as it travels to the workers, which may be on other machines."""
    if image.startswith(("http://", "https://", "data:")):
        return image
    kind = mimetypes.guess_type(image)[0] or "image/png"
    return f"data:{kind};base64," + base64.b64encode(Path(image).read_bytes()).decode()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo", help="checkpoint that the plugin serves")
    parser.add_argument("--questions", type=Path, required=True, help="JSON lines")
    parser.add_argument("--keep", type=float, default=0.25, help="fraction of visual tokens")
    parser.add_argument("--copies", type=int, default=1, help="of the model")
    parser.add_argument("--batch-size", type=int, default=64, help="rows that a copy gets at once")
    parser.add_argument("--max-tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--wheel", help="of this package, for workers on other machines")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON lines")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    lines = options.questions.read_text().splitlines()
    rows = answer([json.loads(line) for line in lines if line.strip()], options)
    write_text(options.output, "".join(json.dumps(row) + "\n" for row in rows))
    ray.shutdown()


if __name__ == "__main__":
    main()
