"""Options that cannot be served stop a plain vLLM, too."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("vllm.version", reason="make test-vllm builds an environment with vLLM")

from served_models import environment

from pitome_vlm.vllm import ARCHITECTURE

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


def test_bad_options_stop_a_plain_vllm_before_it_loads_anything(demo):
    cases = {
        "unknown algorithm 'tomee'": {"pitome": {"keep": 0.25, "algorithm": "tomee"}},
        "keep must be in (0, 1]": {"pitome": {"keep": 0}},
        "keep='auto' cannot be served": {"pitome": {"keep": "auto"}},
        "pitome-vlm serve-args": {},
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
