"""Training data about drawn scenes in LLaVA's format, and a model to train on them."""

from __future__ import annotations

import json
from pathlib import Path

from pitome_vlm.demo import load_split, scene_image


def records(folder: Path, count: int = 12) -> list[dict]:
    """Questions about the first training scenes, their images in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for number, sample in enumerate(load_split("train", count)):
        file = folder / f"{sample.scene_id}.png"
        if not file.is_file():
            scene_image(sample.scene_id, "train").save(file)
        found.append(record(file.name, sample.question, sample.answer, id=number))
    return found


def record(image, question: str, answer: str, **rest) -> dict:
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {**rest, "image": image, "conversations": turns}


def write_lines(path: Path, rows: list) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def louder(weights):
    """Words far enough apart for a frozen head to tell them, so that losses can fall."""
    return {k: 20 * v if "embed_tokens" in k or "lm_head" in k else v for k, v in weights.items()}
