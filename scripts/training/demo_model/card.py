"""The model card, written from what was run and measured.

Knows the text of the card and the order of the last stage: export, then evaluate the exported
files, then write the card. Leaves training to `tower.py` and `language.py`.
"""

from __future__ import annotations

import ast
import platform
import textwrap
from pathlib import Path

import torch
import transformers

from pitome_vlm.common import markdown_table
from pitome_vlm.demo.dataset import SEED, load_split

from .build import build_model
from .evaluate import Figure, ask, blind, figures
from .export import export

STAGES = ("tower", "language", "joint")

HEADER = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
language: en
---

# The pitome_vlm demo model

A tiny but complete LLaVA, trained from nothing on drawn scenes, so that merging visual tokens
can be tried and measured offline in seconds. CLIP tower of 8 layers x 128, images of 120 x 120
pixels as 12 x 12 = 144 patches of 10 (+ CLS), feature layer -2; projector of two layers; Llama of
5 layers x 160 with a word-level vocabulary. 3.0 million parameters, bf16, 6 MB.

```python
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration
from pitome_vlm.demo import checkpoint_path, load_split, scene_image

model = LlavaForConditionalGeneration.from_pretrained(checkpoint_path(), dtype=torch.float32)
processor = AutoProcessor.from_pretrained(checkpoint_path())
sample = load_split("test", limit=1)[0]
turn = [{"type": "image"}, {"type": "text", "text": sample.question}]
prompt = processor.apply_chat_template(
    [{"role": "user", "content": turn}], add_generation_prompt=True
)
image = scene_image(sample.scene_id, "test")
inputs = processor(text=prompt, images=image, return_tensors="pt")
print(processor.decode(model.generate(**inputs, max_new_tokens=2)[0, inputs.input_ids.shape[1]:]))
```
"""

INTERVALS = """

Intervals: bootstrap over images. Text only: a classifier on words and word pairs, trained on the
same training questions; what can be guessed without looking.
"""

LIMITS = """
## Limits

- It knows the words of its templates and these drawings, nothing else: no photographs, no free
  conversation. Unknown words become `<unk>`. Counts are asked up to six.
- One training run with one seed. A difference between two reduction methods on it is evidence
  about the mechanism, not about large models.
- Every training image carried one image per prompt and all 144 patches; no token was ever
  dropped or merged in training, so no reduction method is favoured by augmentation. Positions
  varied by 0 to 10 words before the image and by second turns.
- The tower was taught densely what each patch shows, a real CLIP tower is not: its patch features
  are tidier. CLS was trained as in CLIP (match image and caption within a batch), not on labels
  of object presence; its captions are bags of the words for what the scene holds.
- Counting is the weakest type (mostly off by one). `exists` can be guessed at about 66 % from the
  wording alone, because absent things are mostly named by colour and shape together.
- Held-out figures were measured with float32 arithmetic on the bf16 weights of this folder.

## Licence

Apache-2.0, weights and data generator alike. Nothing but generated images was used.
"""


def _table(rows: list[Figure], guess: dict[str, float]) -> str:
    lines = []
    for f in rows:
        known = f"{guess[f.name]:.1f}" if f.name in guess else ""
        interval = f"{f.low:.1f} to {f.high:.1f}"
        lines.append([f.name, f"{f.accuracy:.1f}", interval, str(f.questions), known])
    return markdown_table(["", "accuracy", "95 % interval", "questions", "text only"], lines)


def _recipe(folder: Path, stage: str, notes: str) -> str:
    rows = []
    for name in STAGES[: STAGES.index(stage) + 1]:
        path = folder / f"{name}.pt"
        if path.exists():
            state = torch.load(path)
            minutes = f"{state['spent'] / 60:.0f}"
            rows.append([name, f"{state['seen']:,}", f"{state['step']:,}", minutes])
    lines = ["\n## Training\n", markdown_table(["stage", "images", "steps", "minutes"], rows)]
    report = ast.literal_eval((folder / "data" / "report.txt").read_text().splitlines()[0])
    lines.append(
        f"""
`python -m scripts.training.demo_model all --folder DIR`: data seed {SEED}, weights seeds 0 (tower)
and 1 (language), two single-thread float32 processes, stopped by time, so a repeat
gives a similar, not an identical model.

{textwrap.fill(notes, 99)}

1. tower: every patch of the feature layer tells colour x shape, size, digit, row and column of
   the object that it shows; CLS matches captions within the batch. Muon for the
   matrices of the layers, AdamW for the rest.
2. language: tower frozen; up to 14 questions packed per image; each sees only the image and
   its own conversation; auxiliary losses at object phrases (row, column and number of what is
   meant) and on projected patches (words for what they show). The auxiliary heads are thrown away.
3. joint: everything at a lower rate, same losses.

{report["train_scenes"]:,} training scenes ({report["train_layouts"]:,} different layouts). Layout
hashes are divided among the splits, so none can be shared; checked over all scenes:
{report["val_collisions"]} of the val and {report["test_collisions"]} of the test layouts occur in
train, {report["val_test_collisions"]} of val in test. Software: Python
{platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}."""
    )
    return "\n".join(lines)


def export_with_card(
    folder: Path, target: Path, sizes: dict[str, int], stage: str, limit: int | None, notes: str
) -> None:
    """Export the weights of `stage`, measure the files on val and test, write the card."""
    model = build_model(**sizes)
    model.load_state_dict(torch.load(folder / f"{stage}.pt")["model"])
    measured = folder / "measured"
    export(model, measured, HEADER)
    guesses = blind(folder, ("val", "test"))
    card = HEADER + _recipe(folder, stage, notes)
    for split in ("val", "test"):
        samples = load_split(split, limit)
        rows = figures(samples, ask(measured, split, limit))
        card += f"\n\n## Accuracy on {split} ({len(samples):,} questions)\n\n"
        card += _table(rows, guesses[split])
    export(model, target, card + INTERVALS + LIMITS)
