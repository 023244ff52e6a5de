"""Save the tiny models of these tests with a chat template, to serve them by hand.

PYTHONPATH=.:tests/support python tests/vllm/engine/save_models.py FOLDER
pitome-vlm serve FOLDER/qwen3_vl --keep 0.25 --dtype float32
"""

from __future__ import annotations

import sys
from pathlib import Path

import served_grids
import served_pooled
import served_tiled
from over_http import chat_template

# By model what writes it, and what stands for an image in a prompt.
MODELS = {
    **dict.fromkeys(("llava_next", "llava_onevision"), (served_tiled.save_tiled, "<image>")),
    **dict.fromkeys(served_grids.MODELS, (served_grids.save_grids, served_grids.MARK)),
    **{kind: (served_pooled.save_pooled, mark) for kind, mark in served_pooled.MARKS.items()},
}


def main(folder: str) -> None:
    for kind, (save, mark) in MODELS.items():
        path = Path(folder, kind)
        save(path, kind)
        path.joinpath("chat_template.jinja").write_text(chat_template(mark))


if __name__ == "__main__":
    main(*sys.argv[1:])
