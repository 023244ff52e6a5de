"""Options that cannot be served stop a plain vLLM, too."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("vllm.version", reason="make test-vllm builds an environment with vLLM")

from served_models import environment

from pitome_vlm.vllm import ARCHITECTURE, ARCHITECTURES

BAD_OVERRIDES = """
import json, sys
from vllm.engine.arg_utils import EngineArgs
for pitome in json.loads(sys.argv[2]):
    try:
        EngineArgs(model=sys.argv[1], enforce_eager=True, hf_overrides={
            "architectures": [sys.argv[3]], **pitome}).create_engine_config()
    except Exception as error:
        print("REFUSED", " ".join(str(error).split()))
    else:
        print("ACCEPTED", pitome)
"""


# One config of vLLM, changed and given to the plugin's check again: making one takes seconds.
CHANGED = """
import copy, json, sys
from types import SimpleNamespace
from vllm.engine.arg_utils import EngineArgs
from pitome_vlm.vllm.startup import MergedConfig


def config(**pitome):
    return EngineArgs(model=sys.argv[1], enforce_eager=True, hf_overrides={
        "architectures": [sys.argv[2]], "pitome": {"keep": 0.25, **pitome}}).create_engine_config()


def drafts(method):
    return SimpleNamespace(method=method, enable_adaptive_verification=False)


def shown(made):
    return [made.model_config.get_head_size(), made.model_config.uses_mrope]


calibrated, plain = config(), config(size_bias=False, positions="compact")
changes = [
    ("parallel_config", {"pipeline_parallel_size": 2}),
    ("parallel_config", {"prefill_context_parallel_size": 2}),
    ("parallel_config", {"enable_dbo": True}),
    ("cache_config", {"cache_dtype": "fp8"}),
    ("speculative_config", drafts("eagle3")),
    ("speculative_config", drafts("ngram")),
    ("model_config.multimodal_config", {"enable_mm_embeds": True}),
    ("model_config.multimodal_config", {"mm_processor_kwargs": {"pitome": {"keep": 0.1}}}),
]
found = []
for name, change in changes:
    answers = []
    for own in (calibrated, plain):
        made = copy.copy(own)
        made.model_config = copy.deepcopy(own.model_config)
        made.model_config.model_arch_config.head_size = 32
        target, _, part = name.rpartition(".")
        holder = getattr(made, target) if target else made
        value = change
        if isinstance(change, dict):
            value = copy.copy(getattr(holder, part))
            for field, new in change.items():
                setattr(value, field, new)
        setattr(holder, part, value)
        try:
            MergedConfig.verify_and_update_config(made)
        except ValueError as error:
            answers.append(str(error))
        else:
            answers.append("")
    found.append(answers)
untouched = config(keep=1.0)
halves = config(size_bias=False, positions="median"), config(positions="compact", size_bias=True)
configs = [shown(one) for one in (calibrated, plain, untouched, *halves)]
print("RESULT", json.dumps([configs, found]))
"""
REFUSED = [
    "--pipeline-parallel-size=2 cannot be combined with calibration: ",
    "--prefill-context-parallel-size=2 cannot be combined with calibration: ",
    "--enable-dbo cannot be combined with calibration: ",
    "--kv-cache-dtype=fp8 cannot be combined with calibration: ",
    "--speculative-config method=eagle3 cannot be combined with calibration: ",
    "",
    "--enable-mm-embeds cannot be combined with calibration: ",
    '--mm-processor-kwargs holds "pitome", which is for single requests',
]


def test_what_calibration_changes_in_vllm_and_what_it_refuses(demo):
    done = subprocess.run(
        [sys.executable, "-c", CHANGED, demo, ARCHITECTURE],
        env=environment(),
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert len(lines) == 1, done.stderr[-3000:]
    configs, found = json.loads(lines[0].removeprefix("RESULT "))
    # Heads of 32 channels, which a CPU's kernels take as 64; without calibration, and where
    # nothing is merged, nothing of vLLM's is changed. Each half changes its own part.
    assert configs == [[64, True], [32, False], [32, False], [32, True], [64, False]]
    for message, (calibrated, plain) in zip(REFUSED, found, strict=True):
        assert calibrated.startswith(message)
        assert bool(calibrated) == bool(message)
        if "--mm-processor-kwargs" in message:
            assert plain == calibrated
            continue
        assert not message or "size_bias=false and positions='compact'" in calibrated
        assert plain == ""


# What a server of half precision counts images by.
LOOKED_AT = """
import json, sys
import torch
from transformers import AutoImageProcessor
from vllm.engine.arg_utils import EngineArgs
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing.context import TimingContext
from vllm.multimodal.processing.inputs import ProcessorInputs
from pitome_vlm import MergeConfig
from pitome_vlm.demo import scene_image
from pitome_vlm.vllm import hf_overrides
from pitome_vlm.vllm.options import PlannedServing

path, seen, own = sys.argv[1], [], PlannedServing.for_pixels
PlannedServing.for_pixels = lambda plan, pixels: seen.append(pixels) or own(plan, pixels)
overrides = hf_overrides(MergeConfig(keep="auto"), path)
model = EngineArgs(model=path, dtype="bfloat16", hf_overrides=overrides).create_model_config()
processor = MULTIMODAL_REGISTRY.create_processor(model)
scene = scene_image(0, "val")
items = processor.info.parse_mm_data({"image": scene})
made = processor.apply(ProcessorInputs([1, 4], items), TimingContext(enabled=False))
exact = AutoImageProcessor.from_pretrained(path)(scene, return_tensors="pt")["pixel_values"]
handed = made["mm_kwargs"]["image"][0]["pixel_values"].data
print("RESULT", torch.equal(seen[0], exact), torch.equal(handed, exact[0].bfloat16()))
"""


def test_counts_follow_pixels_that_are_not_rounded(demo):
    done = subprocess.run(
        [sys.executable, "-c", LOOKED_AT, demo], env=environment(), capture_output=True, text=True
    )
    assert "RESULT True True" in done.stdout, done.stdout + done.stderr[-3000:]


def test_bad_options_stop_a_plain_vllm_before_it_loads_anything(demo):
    cases = {
        "unknown algorithm 'tomee'": {"pitome": {"keep": 0.25, "algorithm": "tomee"}},
        "keep must be in (0, 1]": {"pitome": {"keep": 0}},
        "pitome-vlm serve-args": {},
        "a model of type 'llava' is served by PiToMeLlavaForConditionalGeneration": {
            "architectures": [ARCHITECTURES["llava_next"]],
            "pitome": {"keep": 0.25},
        },
        "max_keep must be at least": {"pitome": {"keep": 0.25, "max_keep": 0.1}},
        "vision_feature_layer=[1, 2] cannot be served": {
            "pitome": {"keep": 0.25},
            "vision_feature_layer": [1, 2],
        },
    }
    done = subprocess.run(
        [sys.executable, "-c", BAD_OVERRIDES, demo, json.dumps(list(cases.values())), ARCHITECTURE],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(("REFUSED", "ACCEPTED"))]
    assert len(lines) == len(cases), done.stdout
    for message, line in zip(cases, lines, strict=True):
        assert line.startswith("REFUSED"), line
        assert message in line
