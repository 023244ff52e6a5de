"""One engine in a process of its own: a job from a JSON file, its results into another.

vLLM keeps state per process, so every test gets a fresh one. Usage: offline.py JOB RESULT
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import torch
from model_features import features_of
from PIL import Image


def generate(llm, job):
    """Greedy token ids, prompt lengths and cached tokens of every request, `passes` times."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=job["tokens"], min_tokens=job["tokens"])
    requests = []
    for request in job["requests"]:
        images = [Image.open(path).convert("RGB") for path in request["images"]]
        own = {"multi_modal_data": {"image": images}} if images else {}
        requests.append({"prompt": request["prompt"], **own})
    passes, names = [], image_names(llm)
    for _ in range(job["passes"]):
        names.clear()
        outputs = llm.generate(requests, sampling, use_tqdm=False)
        passes.append(
            [
                {
                    "answer": list(output.outputs[0].token_ids),
                    "prompt_tokens": len(output.prompt_token_ids),
                    "cached_tokens": output.num_cached_tokens,
                    "image_names": own,
                }
                for output, own in zip(outputs, names, strict=True)
            ]
        )
    return passes


def image_names(llm):
    """A list that is filled with the names under which vLLM caches the images of each request."""
    core, names = llm.llm_engine.engine_core, []
    add = core.add_request

    def noted(request):
        names.append([one.identifier for one in request.mm_features or ()])
        return add(request)

    core.add_request = noted
    return names


def features(llm, job):
    """Visual tokens under each of several merge options, from the running model itself."""
    pixels = torch.load(job["pixels"])
    return llm.apply_model(functools.partial(features_of, job["features"], pixels))[0]


def main(job_path, result_path):
    from vllm import LLM

    job = json.loads(Path(job_path).read_text())
    llm = LLM(**job["engine"])
    result = {"passes": generate(llm, job)}
    Path(result_path).write_text(json.dumps(result))
    if job["features"]:
        torch.save(features(llm, job), result_path + ".pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
