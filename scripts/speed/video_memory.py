"""Peak memory of encoding a video with and without merging, each in a process of its own.

    python -m scripts.speed.video_memory   # 32 frames of 27 x 27 patches, SigLIP-so400m's width

Random weights; the tower has its real width and few layers, because layers run one after the
other and only their width decides the peak. Prints the peak resident memory above what is
resident before encoding begins.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

import pitome_vlm


def build(layers: int):
    vision = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=layers,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
    )
    text = Qwen2Config(
        vocab_size=1024,
        hidden_size=896,
        intermediate_size=1024,
        num_hidden_layers=1,
        num_attention_heads=14,
        num_key_value_heads=2,
    )
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=1001,
        video_token_index=1002,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    torch.manual_seed(0)
    return LlavaOnevisionForConditionalGeneration(config).eval()


def resident() -> int:
    """Bytes of this process that are in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def measure(frames: int, layers: int, options: dict) -> dict:
    torch.set_num_threads(2)
    model = build(layers)
    pixels = torch.randn(1, frames, 3, 384, 384)
    wrapped = pitome_vlm.wrap(model, **options) if options else model
    before, peak, done = resident(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], resident())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.time()
    with torch.no_grad():
        if options:
            tokens = pitome_vlm.encode_videos(wrapped, pixels).counts[0]
        else:
            found = model.model.get_video_features(
                pixels, vision_feature_layer=-1, vision_feature_select_strategy="full"
            )
            tokens = getattr(found, "pooler_output", found).shape[1]
    seconds = time.time() - begin
    done.set()
    watcher.join()
    return {"tokens": tokens, "peak": peak[0] - before, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one is not None:
        print(json.dumps(measure(given.frames, given.layers, json.loads(given.one))))
        return
    rows = [{}, {"keep": 0.25}, {"keep": 0.25, "temporal": True}]
    rows += [{"keep": 0.25, "algorithm": "pitome"}, {"keep": 0.25, "stage": "projector"}]
    whole = None
    print(f"{given.frames} frames of 729 patches, {given.layers} layers, float32, torch "
          f"{torch.__version__}")  # fmt: skip
    for options in rows:
        command = [sys.executable, "-m", __spec__.name, "--frames", str(given.frames)]
        command += ["--layers", str(given.layers), "--one", json.dumps(options)]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = json.loads(out.splitlines()[-1])
        whole = whole or found["peak"]
        name = " ".join(f"{key}={value}" for key, value in options.items()) or "unwrapped"
        print(
            f"{name:<28} {found['tokens']:>6} tokens  {found['peak'] / 2**20:8.0f} MiB "
            f"({100 * found['peak'] / whole:5.1f} %)  {found['seconds']:6.1f} s"
        )


if __name__ == "__main__":
    main()
