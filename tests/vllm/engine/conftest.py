"""Engines, models and requests for the tests of the vLLM plugin.

`make test-vllm` builds an environment with vLLM and runs this folder; `make test` leaves it out.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from served_models import ANSWER_TOKENS, environment, pixels_of, save_tiny

from pitome_vlm.demo import checkpoint_path, load_split, scene_image
from pitome_vlm.vllm import hf_overrides
from pitome_vlm.vllm.command import server_environment

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Four scenes of different shapes, as files."""
    folder = tmp_path_factory.mktemp("images")
    paths = []
    for number, size in enumerate([(192, 192), (120, 240), (300, 90), (64, 64)]):
        path = folder / f"{number}.png"
        scene_image(number, "val").resize(size).save(path)
        paths.append(str(path))
    return paths


@pytest.fixture(scope="session")
def requests(images):
    """One image, two images, the first one again with another question, text alone."""
    return [
        {"prompt": "user: <image> how many stars are there? assistant:", "images": images[:1]},
        {
            "prompt": "user: <image> what is this ? user: <image> what colour is the circle? "
            "assistant:",
            "images": images[1:3],
        },
        {
            "prompt": "user: <image> what colour is the largest object? assistant:",
            "images": images[:1],
        },
        {"prompt": "user: what colour is the square? assistant:", "images": []},
    ]


@pytest.fixture(scope="session")
def questions(tmp_path_factory):
    """What the bundled model was trained on, about drawn scenes."""
    folder, found = tmp_path_factory.mktemp("scenes"), []
    for sample in load_split("val", 40):
        path = folder / f"{sample.scene_id}.png"
        scene_image(sample.scene_id, "val").save(path)
        prompt = f"user: <image> {sample.question} assistant:"
        found.append({"prompt": prompt, "images": [str(path)]})
    return found


@pytest.fixture(scope="session")
def demo():
    return str(checkpoint_path())


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"), "clip")


@pytest.fixture(scope="session")
def tiny_siglip(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny_siglip"), "siglip")


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory):
    """With a Qwen2 language model whose rotary positions are stretched by YaRN."""
    return save_tiny(tmp_path_factory.mktemp("tiny_qwen"), "clip", qwen=True)


class Starter:
    """Runs jobs in copies of one process, of which a new one is made after a job that hung.

    Args:
        **own: environment variables in which vLLM is imported.
    """

    def __init__(self, **own):
        self._env, self._process = server_environment(environment(**own)), None

    def run(self, order):
        """The exit status of a job."""
        if self._process is None:
            command = [sys.executable, str(HERE / "offline.py")]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self._process = subprocess.Popen(command, env=self._env, text=True, **pipes)
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            status, job = self._process.stdout.readline().split()
            assert job == order["job"]
        except BaseException:
            self.close()
            raise
        return int(status)

    def close(self):
        """Also end a job that runs."""
        process, self._process = self._process, None
        if process is not None:
            with process:
                process.send_signal(signal.SIGTERM)


@pytest.fixture(scope="session")
def imported():
    with contextlib.closing(Starter()) as starter:
        yield starter


@pytest.fixture
def engine(tmp_path, imported):
    """Runs one job in a fresh process and returns its passes (and `pixels_of`'s features).

    After `passes` come those with `adapters`, and `controls`, in which something is wrong on
    purpose. `refused` are requests over HTTP that cannot be answered, with what has to be said to
    them (None to one that is answered); `mark` stands for an image in prompts.
    """

    def run(
        path,
        requests,
        config=None,
        *,
        passes=1,
        tokens=ANSWER_TOKENS,
        adapters=(),
        controls=(),
        refused=(),
        mark="<image>",
        features=(),
        several=False,
        preempted=False,
        second_runner=False,
        linear_attention=False,
        max_keep=None,
        env=None,
        **options,
    ):
        job = {
            "engine": {
                "model": path,
                "dtype": "float32",
                "enforce_eager": True,
                "max_model_len": 400,
                "max_num_seqs": 4,
                "limit_mm_per_prompt": {"image": 2},
                **(
                    {"hf_overrides": hf_overrides(config, path, max_keep=max_keep)}
                    if config is not None
                    else {}
                ),
                **options,
            },
            "requests": requests,
            "tokens": tokens,
            "passes": passes,
            "adapters": list(adapters),
            "controls": list(controls),
            "refused": [request for request, _ in refused],
            "mark": mark,
            "second_runner": second_runner,
            "features": list(features),
            "pixels": str(tmp_path / "pixels.pt"),
        }
        if features:
            torch.save(pixels_of(path), job["pixels"])
        job_path, result_path = tmp_path / "job.json", tmp_path / "result.json"
        job_path.write_text(json.dumps(job))
        # Variables that vLLM, or what it imports, reads while it is imported.
        early = {"LINEAR_ATTENTION_IN_FLOAT32": "1"} if linear_attention else {}
        if second_runner:
            early = {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"}
        own = {} if several else {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        order = {"job": str(job_path), "result": str(result_path), "log": str(tmp_path / "log")}
        # As `pitome-vlm serve` starts an engine.
        order["env"] = server_environment(environment(**own, **early, **(env or {})))
        fresh = contextlib.closing(Starter(**early)) if early else contextlib.nullcontext(imported)
        with fresh as starter:
            status = starter.run({**order, "alone": bool(early)})
        assert status == 0, (tmp_path / "log").read_text()[-9000:]
        result = json.loads(result_path.read_text())
        assert not preempted or result["preemptions"] > 0
        for (code, said), (request, message) in zip(result["refused"], refused, strict=True):
            assert code // 100 == (2 if message is None else 4), (code, said, str(request)[:300])
            assert (message or "") in said, (said, str(request)[:300])
            assert not message or len(said.splitlines()) == 1
        if not features:
            return result["passes"]
        return result["passes"], torch.load(str(result_path) + ".pt")

    return run
