"""The Triton kernel of greedy selection: what can be known of it without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="Triton is built for Linux only"),
]
INTERPRETED = Path(__file__).parents[1] / "support" / "greedy_kernel_interpreted.py"


def test_interpreted_it_chooses_what_a_plain_loop_chooses():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, str(INTERPRETED)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_it_compiles_for_gpus(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pitome_vlm.merge.greedy_kernel import _select

    for capability in (80, 90):
        for dtype in ("fp32", "fp64"):
            signature = {"distance": f"*{dtype}", "first": "*i64", "chosen": "*i64"}
            signature |= {"n_tokens": "i32", "n_out": "i32", "block": "constexpr"}
            source = ASTSource(_select, signature, {"block": 1024})
            made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
            assert made.asm["cubin"], (capability, dtype)
