"""Engines in processes of their own: jobs from JSON files, their results into others.

vLLM keeps state per process, so every test gets a fresh one; importing vLLM takes longer than most
engines do, so they are copies of this process, which has it imported. A line on stdin is a job, a
line on stdout the exit status of its process and the job's name.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import json
import os
import signal
import sys
import types
from pathlib import Path

import torch
from model_features import features_of
from over_http import responses
from PIL import Image
from served_tiled import frames_of


def generate(llm, job):
    """Greedy token ids, prompt lengths and cached tokens of every request, `passes` times."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    sampling = SamplingParams(temperature=0, max_tokens=job["tokens"], min_tokens=job["tokens"])
    requests = [prompt_of(request) for request in job["requests"]]
    passes, names = [], image_names(llm)
    plain = [(None, None)] * job["passes"]
    adapted = [(None, path) for path in job["adapters"]]
    for control, path in plain + adapted + [(control, None) for control in job["controls"]]:
        names.clear()
        adapter = LoRARequest("mine", 1, path) if path else None
        with CONTROLS[control](llm) if control else contextlib.nullcontext():
            outputs = llm.generate(requests, sampling, use_tqdm=False, lora_request=adapter)
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


def prompt_of(request):
    """A request as vLLM takes it."""
    images = [Image.open(path).convert("RGB") for path in request["images"]]
    data = {"image": images} if images else {}
    if request.get("frames"):
        data["video"] = frames_of(request["frames"])
    own = {"multi_modal_data": data} if data else {}
    if request.get("pitome"):
        own["mm_processor_kwargs"] = {"pitome": request["pitome"]}
    return {"prompt": request["prompt"], **own}


@contextlib.contextmanager
def compact_decoding(llm):
    """Decoded tokens count on from the shortened prompt instead of from the whole one."""
    (model,) = llm.apply_model(type)
    own = model.get_mrope_input_positions
    model.get_mrope_input_positions = lambda self, *prompt: (own(self, *prompt)[0], 0)
    yield
    model.get_mrope_input_positions = own


@contextlib.contextmanager
def no_sizes(llm):
    """Every token counts as one patch."""
    from pitome_vlm.vllm import calibration

    assert llm.reset_prefix_cache()
    own = calibration.key_channels
    calibration.key_channels = lambda bias, *others: own(0 * bias, *others)
    yield
    calibration.key_channels = own


@contextlib.contextmanager
def no_places(llm):
    """Every token sits where its image begins."""
    from pitome_vlm.vllm.rotary import StepTable

    assert llm.reset_prefix_cache()
    own = StepTable.forward
    StepTable.forward = lambda self, places: own(self, places.amin(0, keepdim=True).expand(3, -1))
    yield
    StepTable.forward = own


CONTROLS = {"compact decoding": compact_decoding, "no sizes": no_sizes, "no places": no_places}


def second_runner():
    """Let vLLM run its second model runner, whose kernels are in Triton, without a GPU."""
    import triton.backends

    active = types.SimpleNamespace(is_active=lambda: True)
    triton.backends.backends["cpu"] = types.SimpleNamespace(driver=active, compiler=None)
    # vLLM 0.27 asks for its version under a name that builds of another name lack.
    own = importlib.metadata.version
    importlib.metadata.version = lambda name: "+cpu" if name == "vllm" else own(name)
    importlib.import_module("vllm.platforms")
    importlib.import_module("vllm.triton_utils.importing")
    importlib.metadata.version = own


def preemptions(llm):
    """How often a request had to make room for another one."""
    metrics = llm.get_metrics() if llm.llm_engine.log_stats else []
    return sum(one.value for one in metrics if one.name == "vllm:num_preemptions")


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
    job = json.loads(Path(job_path).read_text())
    if job["second_runner"]:
        second_runner()
    from vllm import LLM

    llm = LLM(**job["engine"])
    # First, so that what comes later shows whether the engine is still whole.
    said = responses(llm, job["refused"], job["mark"]) if job["refused"] else []
    result = {"passes": generate(llm, job), "preemptions": preemptions(llm), "refused": said}
    Path(result_path).write_text(json.dumps(result))
    if job["features"]:
        torch.save(features(llm, job), result_path + ".pt")


# Before vLLM, in all processes of an engine: each of them runs this file under another name.
if "LINEAR_ATTENTION_IN_FLOAT32" in os.environ:
    importlib.import_module("gdn_in_float32").install()


def stop(running):
    """End a job and the processes that it left."""
    while running:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(running.pop(), signal.SIGKILL)


def serve():
    """Run the job of each line of stdin in a copy of this process."""
    # Whatever else is printed goes to stderr.
    statuses = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    running: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: (stop(running), os._exit(1)))
    for line in sys.stdin:
        order = json.loads(line)
        if not order["alone"]:
            importlib.import_module("vllm").LLM  # noqa: B018, imported at its first use
        copy = os.fork()
        if not copy:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.setpgid(0, 0)
            log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ.clear()
            os.environ.update(order["env"])
            return main(order["job"], order["result"])
        running.append(copy)
        status = os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1])
        stop(running)
        statuses.write(f"{status} {order['job']}\n")
        statuses.flush()


if __name__ == "__main__":
    serve()
