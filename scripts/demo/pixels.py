"""What keep="auto" with adapt="pixels" keeps of drawn pages, and what it costs on the demo.

    python -m scripts.demo.pixels --output eval/results/pixels

Pages are drawn with Pillow at 150 dots per inch and brought to 336 x 336 pixels, the overview of
LLaVA-1.5 and LLaVA-NeXT (24 x 24 patches). Questions are the demo's validation split. Writes
report.md, results.json and, with --pages, the pages themselves.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration

from pitome_vlm import MergeConfig
from pitome_vlm.common import markdown_table, write_text
from pitome_vlm.demo import checkpoint_path, load_split
from pitome_vlm.demo.dataset import SPLIT_SCENES
from pitome_vlm.measure.demo_benchmark import (
    Outcome,
    Setting,
    accuracy_interval,
    difference_intervals,
    family_words,
    run,
)
from pitome_vlm.measure.provenance import provenance
from pitome_vlm.merge.pixels import distinct_share, keep_of
from pitome_vlm.wrapping.encode import visual_token_counts
from pitome_vlm.wrapping.wrap import wrapped

from ..command import command_line

SIZE, SIDE, GRID = (1240, 1754), 336, (24, 24)
RANGE = MergeConfig(keep="auto").keep_range
WORDS = ("the", "tokens", "of", "an", "image", "that", "say", "same", "are", "merged", "before")
LEFT, RIGHT = 120, 1120


@functools.cache
def font(size: int) -> Any:
    """Pillow's own."""
    return ImageFont.load_default(size)


def page() -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """A4 at 150 dots per inch, blank."""
    image = Image.new("RGB", SIZE, "white")
    return image, ImageDraw.Draw(image)


def lines(draw: ImageDraw.ImageDraw, top: int, bottom: int, draws: random.Random) -> None:
    """Running text of 11 points between two heights."""
    for y in range(top, bottom, 34):
        words = " ".join(draws.choice(WORDS) for _ in range(30))
        while draw.textlength(words, font(23)) > RIGHT - LEFT:
            words = words.rsplit(" ", 1)[0]
        draw.text((LEFT, y), words, "black", font(23))


def text_page(draws: random.Random) -> Image.Image:
    """Running text from top to bottom."""
    image, draw = page()
    draw.text((LEFT, 120), "A page of text", "black", font(40))
    lines(draw, 220, 1600, draws)
    return image


def letter(draws: random.Random) -> Image.Image:
    """A third of a page of text."""
    image, draw = page()
    draw.text((LEFT, 160), "To whom it may concern", "black", font(28))
    lines(draw, 420, 900, draws)
    draw.text((LEFT, 1100), "Yours sincerely", "black", font(28))
    return image


def table(draws: random.Random) -> Image.Image:
    """Twenty rows of numbers between rules."""
    image, draw = page()
    draw.text((LEFT, 140), "Measurements", "black", font(36))
    for row in range(21):
        y = 240 + row * 60
        draw.line((LEFT, y, RIGHT, y), "black", 2)
        for column in range(6):
            x = LEFT + 10 + column * 168
            draw.text((x, y + 16), f"{draws.uniform(0, 1000):.2f}", "black", font(24))
    draw.line((LEFT, 240 + 21 * 60, RIGHT, 240 + 21 * 60), "black", 2)
    return image


def form(draws: random.Random) -> Image.Image:
    """Labelled boxes, every second one filled in."""
    image, draw = page()
    draw.text((LEFT, 120), "Application", "black", font(40))
    for row in range(12):
        y = 260 + row * 110
        draw.text((LEFT, y + 14), draws.choice(WORDS).title(), "black", font(24))
        draw.rectangle((LEFT + 260, y, RIGHT, y + 56), outline="black", width=2)
        if row % 2:
            filled = " ".join(draws.choices(WORDS, k=3))
            draw.text((LEFT + 276, y + 14), filled, "navy", font(26))
    return image


def screenshot(draws: random.Random) -> Image.Image:
    """A window with a bar, a list at its side and some buttons; 1440 x 900 pixels."""
    image = Image.new("RGB", (1440, 900), "#f4f5f7")
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, 1440, 56), "#20304a")
    draw.text((24, 16), "Inbox", "white", font(22))
    draw.rectangle((0, 56, 280, 900), "#e3e7ee")
    for row in range(9):
        draw.text((24, 84 + row * 44), draws.choice(WORDS).title(), "#20304a", font(20))
    for row in range(4):
        y = 90 + row * 170
        draw.rectangle((320, y, 1400, y + 140), "white", "#c9d0dc")
        draw.text((344, y + 18), " ".join(draws.choices(WORDS, k=5)), "black", font(22))
        draw.text((344, y + 60), " ".join(draws.choices(WORDS, k=10)), "#606a7a", font(18))
        draw.rectangle((1240, y + 90, 1376, y + 124), "#2f6fed")
    return image


def photo(draws: random.Random) -> Image.Image:
    """Texture of all scales, what a photo is to this rule."""
    noise, image = np.random.default_rng(draws.randrange(2**31)), np.zeros((640, 640, 3))
    for scale in (8, 32, 128, 640):
        layer = noise.uniform(0, 255, (scale, scale, 3)).astype(np.uint8)
        image += np.asarray(Image.fromarray(layer).resize((640, 640), Image.Resampling.BICUBIC)) / 4
    return Image.fromarray(image.astype(np.uint8))


PAGES: dict[str, Callable[[random.Random], Image.Image]] = {
    "blank page": lambda _: page()[0],
    "letter": letter,
    "form": form,
    "table": table,
    "screenshot": screenshot,
    "full page of text": text_page,
    "texture": photo,
}
QUALITIES = (1.0, 0.99, 0.95)
SETTINGS = (
    Setting("no reduction", MergeConfig(keep=1.0, algorithm="none")),
    Setting("keep='auto', adapt='pixels'", MergeConfig(keep="auto", adapt="pixels")),
    Setting("keep='auto', adapt='features'", MergeConfig(keep="auto")),
    # Merges only what is equal, or nearly so.
    *(
        Setting(
            f"keep='auto', quality={quality}, keep_range=(1/16, 1)",
            MergeConfig(keep="auto", quality=quality, keep_range=(1 / 16, 1.0)),
        )
        for quality in QUALITIES
    ),
)


def overview(image: Image.Image) -> Tensor:
    """[1, 3, SIDE, SIDE], normalised as CLIP's processor does."""
    small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1).float() / 255
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    return ((pixels - mean) / deviation)[None]


def pages_table(images: dict[str, Image.Image]) -> str:
    """What is kept of every page."""
    rows = []
    for name, image in images.items():
        pixels = overview(image)
        share, keep = distinct_share(pixels, GRID), keep_of(pixels, GRID, RANGE)
        tokens = MergeConfig(keep=keep).budget.target(GRID[0] * GRID[1])
        rows.append([name, f"{100 * share:.0f} %", f"{keep:.3f}", f"{tokens}"])
    return markdown_table(["drawn", "patches that say something", "keep", "of 576"], rows)


def lossless_table(images: dict[str, Image.Image], model: Any, processor: Any) -> str:
    """What the bundled model's tower keeps of every page where only equal tokens are merged."""
    pixels = processor.image_processor(list(images.values()), return_tensors="pt")["pixel_values"]
    counts = []
    for setting in SETTINGS[-len(QUALITIES) :]:
        with wrapped(model, config=setting.config), torch.no_grad():
            counts.append(visual_token_counts(model, pixels))
    rows = [
        [name, *(str(kept) for kept in of_page)]
        for name, of_page in zip(images, zip(*counts, strict=True), strict=True)
    ]
    return markdown_table(["drawn", *(f"quality={quality}" for quality in QUALITIES)], rows)


def demo_table(outcomes: list[Outcome], samples: list[Any]) -> str:
    """Accuracy with intervals, and the difference to no reduction on the same questions."""
    rows, whole = [], outcomes[0].correct.astype(float)
    changes = [one.correct.astype(float) - whole for one in outcomes[1:]]
    shown = [
        f"{100 * change.mean():+.2f} ({low:+.2f} to {high:+.2f})"
        for change, (low, high) in zip(changes, difference_intervals(samples, changes), strict=True)
    ]
    for one, change in zip(outcomes, ["", *shown], strict=True):
        low, high = accuracy_interval(samples, one.correct)
        accuracy = f"{one.accuracy:.2f} ({low:.1f} to {high:.1f})"
        rows.append([one.setting.name, f"{one.tokens:.1f}", accuracy, change])
    columns = ["", "tokens of 144", "accuracy in %", "difference to no reduction"]
    return markdown_table(columns, rows)


def measure(wanted: argparse.Namespace, model: Any, processor: Any) -> dict[str, Any]:
    """Ask the questions of the validation split under every setting."""
    samples = load_split("val", wanted.limit)
    outcomes = run(model, processor, SETTINGS[:2], samples, split="val")
    # The fixed budget that keeps as many on average.
    tokens = round(outcomes[1].tokens)
    fixed = Setting(f"tokens={tokens} for all", MergeConfig(tokens=tokens))
    outcomes += run(model, processor, [fixed, *SETTINGS[2:]], samples, split="val")
    facts = provenance(
        model, split="val", questions=len(samples), scenes=SPLIT_SCENES["val"], batch_size=48
    )
    return {
        "provenance": facts,
        "command": command_line(),
        "settings": {
            one.setting.name: {
                "config": one.setting.config.to_dict(),
                "tokens": one.tokens,
                "correct": "".join("01"[int(right)] for right in one.correct),
            }
            for one in outcomes
        },
    }


def outcomes_of(results: dict[str, Any]) -> list[Outcome]:
    """What was measured, without the answers themselves."""
    return [
        Outcome(
            Setting(name, MergeConfig.from_dict(one["config"])),
            one["tokens"],
            [],
            np.array([bit == "1" for bit in one["correct"]]),
        )
        for name, one in results["settings"].items()
    ]


def report(
    results: dict[str, Any], images: dict[str, Image.Image], model: Any, processor: Any
) -> str:
    """The whole page; what is kept of drawn pages is counted for it."""
    outcomes, facts = outcomes_of(results), results["provenance"]
    samples = load_split(facts["split"], facts["questions"])
    facts_line = ", ".join(f"{name} {value}" for name, value in facts.items())
    parts = [
        '# keep="auto" with adapt="pixels"',
        f"`{results['command']}`",
        "## Drawn pages, 336 x 336 pixels in 24 x 24 patches",
        pages_table(images).rstrip(),
        f"keep_range is {RANGE}. A patch says something where it is like less than two of its "
        "neighbours (alike: grey levels differ by at most 5 of 255 on average). It is worth a "
        "token, and so are 16 of the others.",
        "## The same pages and the bundled model's tower, tokens of 144 kept by features",
        lossless_table(images, model, processor).rstrip(),
        "keep_range=(1/16, 1): the tower merges nothing, the last step merges what `quality` of "
        "the variance allows. With 1.0 that are tokens that are equal, and a tower with position "
        "embeddings makes no two of them equal, not even of a blank page.",
        "## The bundled model, validation split",
        demo_table(outcomes, samples).rstrip(),
        f"Intervals of accuracies resample images. {family_words(len(outcomes) - 1)} {facts_line}.",
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Draw, count, ask, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--limit", type=int, help="first questions only")
    parser.add_argument("--pages", action="store_true", help="write the pages as PNG too")
    parser.add_argument("--rewrite", action="store_true", help="the page again, without a run")
    wanted = parser.parse_args()
    images = {name: draw(random.Random(0)) for name, draw in PAGES.items()}
    wanted.output.mkdir(parents=True, exist_ok=True)
    if wanted.pages:
        for name, image in images.items():
            image.save(wanted.output / f"{name.replace(' ', '_')}.png")
    path, stored = checkpoint_path(), wanted.output / "results.json"
    model = LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(path)
    if wanted.rewrite:
        results = json.loads(stored.read_text())
    else:
        results = measure(wanted, model, processor)
        write_text(stored, json.dumps(results, indent=1) + "\n")
    write_text(wanted.output / "report.md", report(results, images, model, processor))


if __name__ == "__main__":
    main()
