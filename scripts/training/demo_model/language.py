"""Stages "language" and "joint": the projector and the language model, then everything.

Knows the losses on answers, on object phrases (which row and column is meant, how many) and on
projected patches. Leaves scenes to `data.py` and sequences to `packing.py`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from pitome_vlm.demo.processor import EOS, IMAGE, PATCHES

from . import parallel
from .build import build_model
from .data import Arrays
from .packing import Packed, pack
from .tower import TowerHeads, make_batch, to_pixels, tower_loss, tower_outputs
from .world import DEMO, World

MOST = 10
# Most phrases mean nothing or just one object.
NUMBER_WEIGHTS = torch.tensor([1.0, 1.0, *[3.0] * (MOST - 2)])


class LanguageHeads(nn.Module):
    """Read-outs of object phrases and projected patches, thrown away after training."""

    def __init__(self, width: int, layer: int, world: World = DEMO) -> None:
        super().__init__()
        self.layer, self.world = layer, world
        self.norm = nn.LayerNorm(width)
        self.phrase = nn.Linear(width, 2 * world.grid + MOST)
        self.bias = nn.Parameter(torch.full((len(world.shown_words),), -2.0))
        self.scale = nn.Parameter(torch.zeros(1))


@dataclass
class Answer:
    """Logits at the answers, their losses, and the mean of the losses by name."""

    logits: Tensor
    total: Tensor
    parts: dict[str, Tensor]


def run(
    model: LlavaForConditionalGeneration, heads: LanguageHeads, features: Tensor, p: Packed
) -> tuple[Answer, Tensor]:
    """Losses of one packed batch from the tower's patch features; also the projected patches."""
    inner = model.model
    image = inner.multi_modal_projector(features)
    embedded = inner.language_model.embed_tokens(p.ids)
    embedded = embedded.masked_scatter((p.ids == IMAGE)[..., None], image.to(embedded.dtype))
    out = inner.language_model(
        inputs_embeds=embedded,
        attention_mask=p.mask,
        position_ids=p.positions,
        use_cache=False,
        output_hidden_states=True,
    )
    final = out.last_hidden_state
    at, after = (p.answer_at[0], p.answer_at[1]), (p.answer_at[0], p.answer_at[1] + 1)
    logits = model.lm_head(final[at])
    parts = {
        "answer": _weighted_mean(
            functional.cross_entropy(logits, p.answers, reduction="none"),
            heads.world.weights[p.types],
        ),
        "end": functional.cross_entropy(
            model.lm_head(final[after]), torch.full_like(p.answers, EOS)
        ),
    }
    hidden = out.hidden_states[heads.layer][p.mention_at[0], p.mention_at[1]]
    grid = heads.world.grid
    row, column, number = heads.phrase(heads.norm(hidden)).split((grid, grid, MOST), -1)
    unique = p.mentions[:, 1] >= 0
    parts["row"] = functional.cross_entropy(row[unique], p.mentions[unique, 1])
    parts["column"] = functional.cross_entropy(column[unique], p.mentions[unique, 2])
    several = p.mentions[:, 0]
    parts["number"] = functional.cross_entropy(number, several, weight=NUMBER_WEIGHTS)
    total = parts["answer"] + 0.05 * parts["end"]
    total = total + 0.15 * (parts["row"] + parts["column"]) + 0.6 * parts["number"]
    return Answer(logits, total, parts), image


def _weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    return (values * weights).sum() / weights.sum()


def alignment(
    model: LlavaForConditionalGeneration,
    heads: LanguageHeads,
    image: Tensor,
    objects: Tensor,
    patches: Tensor,
) -> Tensor:
    """How well projected patches point at the embeddings of the words for what they show."""
    world = heads.world
    rows = torch.tensor([world.words[word] for word in world.shown_words])
    table = model.model.language_model.embed_tokens.weight[rows]
    logits = image @ table.T * (heads.scale.exp() * table.shape[1] ** -0.5) + heads.bias
    on = patches >= 0
    shown = objects.gather(1, patches.clamp(min=0)[..., None].expand(-1, -1, objects.shape[-1]))
    target = world.shown(shown[on])
    shown_loss = (
        functional.binary_cross_entropy_with_logits(logits[on], target, reduction="none")
        .sum(-1)
        .mean()
    )
    ground = functional.softplus(logits[~on]).sum(-1).mean()
    return shown_loss + 0.3 * ground


class Features:
    """Patch features of the frozen tower, computed when first asked for, kept in 16 bits."""

    def __init__(self, tower: nn.Module, arrays: Arrays) -> None:
        self.tower, self.arrays = tower, arrays
        width = tower.config.hidden_size
        self.known = np.zeros(len(arrays), bool)
        self.store = torch.empty(len(arrays), PATCHES, width, dtype=torch.float16)

    @torch.no_grad()
    def __call__(self, scenes: np.ndarray) -> Tensor:
        """Features [scenes, patches, width] in float32."""
        new = scenes[~self.known[scenes]]
        if len(new):
            features, _ = tower_outputs(self.tower, to_pixels(self.arrays.images[new]))
            self.store[torch.from_numpy(new)] = features.half()
            self.known[new] = True
        return self.store[torch.from_numpy(scenes)].float()


@torch.no_grad()
def scores(
    model: LlavaForConditionalGeneration, heads: LanguageHeads, features: Features, count: int
) -> dict[str, float]:
    """Accuracy by question type and scene kind over the first `count` scenes of a split."""
    arrays, world = features.arrays, heads.world
    tally: dict[str, list[int]] = {}
    for first in range(0, min(count, len(arrays)), 32):
        scenes = np.arange(first, min(first + 32, count, len(arrays)))
        packed = pack(arrays, scenes, None, None, heads.world)
        answer, _ = run(model, heads, features(scenes), packed)
        right = (answer.logits.argmax(-1) == packed.answers).tolist()
        for hit, kind, scene in zip(
            right, packed.types.tolist(), packed.answer_at[0].tolist(), strict=True
        ):
            for name in ("all", world.types[kind], world.kinds[(first + scene) % len(world.kinds)]):
                entry = tally.setdefault(name, [0, 0])
                entry[0] += hit
                entry[1] += 1
    return {name: round(100 * hits / seen, 1) for name, (hits, seen) in tally.items()}


def initialise_projector(model: LlavaForConditionalGeneration, sample: Tensor) -> None:
    """Start the projector so that its inputs look standardised, whatever the tower's scale."""
    linear = model.model.multi_modal_projector.linear_1
    flat = sample.flatten(0, 1)
    linear.weight.data /= flat.std(0).clamp(min=1e-3)
    linear.bias.data = -linear.weight.data @ flat.mean(0)


@dataclass
class Trained:
    """The modules of a language or joint stage."""

    model: LlavaForConditionalGeneration
    heads: LanguageHeads
    tower_heads: TowerHeads

    def modules(self) -> dict[str, nn.Module]:
        """By their names in the checkpoint."""
        return {"model": self.model, "heads": self.heads, "tower_heads": self.tower_heads}


def open_stage(folder: Path, stage: str, sizes: dict[str, int], grounding_layer: int) -> Trained:
    """New modules that start where the stage before `stage` ended."""
    model = build_model(**sizes)
    heads = LanguageHeads(model.config.text_config.hidden_size, grounding_layer)
    trained = Trained(model, heads, TowerHeads(model.config.vision_config.hidden_size))
    if stage == "joint":
        stored = torch.load(folder / "language.pt")
        for name, module in trained.modules().items():
            module.load_state_dict(stored[name])
    else:
        tower = torch.load(folder / "tower.pt")
        model.model.vision_tower.load_state_dict(tower["tower"])
        trained.tower_heads.load_state_dict(tower["heads"])
        model.model.vision_tower.requires_grad_(False)
        trained.tower_heads.requires_grad_(False)
    return trained


def train_language(
    folder: Path,
    stage: str,
    minutes: float,
    batch: int,
    per_scene: int,
    sizes: dict[str, int],
    rates: tuple[float, float],
    grounding_layer: int = 3,
    seed: int = 0,
) -> None:
    """Train `stage` ("language": tower frozen; "joint": all) for `minutes` of processor time."""
    rank, _ = parallel.start()
    torch.manual_seed(seed + 1)
    trained = open_stage(folder, stage, sizes, grounding_layer)
    model, tower = trained.model, trained.model.model.vision_tower
    data = folder / "data"
    arrays, val = Arrays.load(data / f"train{rank}"), Arrays.load(data / "val")
    features = Features(tower, arrays)
    if stage == "language":
        initialise_projector(model, features(np.arange(min(64, len(arrays)))))
    loop = parallel.Loop(folder / f"{stage}.pt", trained.modules(), rates)
    rng = random.Random(f"{seed}/{loop.step}/{rank}" if seed else f"{loop.step}/{rank}")

    def loss(scenes: np.ndarray) -> tuple[Tensor, dict[str, Tensor]]:
        packed = pack(arrays, scenes, per_scene, rng)
        return stage_loss(
            trained, arrays, features if stage == "language" else None, scenes, packed
        )

    def score(final: bool) -> dict[str, float]:
        # The tower moves in the joint stage: its features are computed anew each time.
        return scores(model, trained.heads, Features(tower, val), 400 if final else 120)

    loop.run(minutes, batch, len(arrays), loss, score)


def stage_loss(
    trained: Trained,
    arrays: Arrays,
    features: Features | None,
    scenes: np.ndarray,
    packed: Packed,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The whole loss of a batch; without stored `features` the tower is run and trained too."""
    extra: Tensor | float = 0.0
    if features is None:
        b = make_batch(arrays, scenes)
        patches, pooled = tower_outputs(trained.model.model.vision_tower, b.pixels)
        extra, _ = tower_loss(trained.tower_heads, patches, pooled, b)
    else:
        patches = features(scenes)
    total, parts = answer_loss(trained.model, trained.heads, arrays, patches, scenes, packed)
    return total + 0.5 * extra, parts


def answer_loss(
    model: LlavaForConditionalGeneration,
    heads: LanguageHeads,
    arrays: Arrays,
    patches: Tensor,
    scenes: np.ndarray,
    packed: Packed,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Of answers, object phrases and projected patches, from features [scenes, patches, width]."""
    answer, image = run(model, heads, patches, packed)
    align = aligned(model, heads, image, arrays, scenes)
    return answer.total + 0.2 * align, {**answer.parts, "align": align}


def aligned(
    model: LlavaForConditionalGeneration,
    heads: LanguageHeads,
    image: Tensor,
    arrays: Arrays,
    scenes: np.ndarray,
) -> Tensor:
    """`alignment` of the projected patches of some scenes."""
    objects = torch.from_numpy(arrays.objects[scenes]).long()
    shown = torch.from_numpy(arrays.patch_object[scenes]).long()
    return alignment(model, heads, image, objects, shown)
