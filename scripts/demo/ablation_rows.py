"""The rows of the ablation, and which of a stored run still hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor

from pitome_vlm import MergeConfig
from pitome_vlm.measure.demo_benchmark import Setting, ask
from pitome_vlm.merge import Algorithm, MergeContext, MergePlan
from pitome_vlm.merge.algorithm import every_pair
from pitome_vlm.merge.algorithms import pitome_plus
from pitome_vlm.merge.algorithms.pitome import EnergyOptions, energies
from pitome_vlm.merge.matching import keep_only
from pitome_vlm.merge.similarity import Similarity

from . import spread
from .stored import holds

BUDGETS = (72, 36, 18, 9)
# How a model is asked: an option of rows, not of `MergeConfig`.
ASK = "ask"
# The layers that the bundled model's tower runs; other towers have others.
EVERY = tuple(range(7))
# (what is varied, its value, the options that differ from the default)
ROWS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("default", "pitome_plus, hidden states, calibrated", {}),
    ("calibration", "neither", {"size_bias": False, "positions": "compact"}),
    ("calibration", "size bias alone", {"size_bias": True, "positions": "compact"}),
    ("calibration", "mean positions alone", {"size_bias": False, "positions": "mean"}),
    ("calibration", "original positions alone", {"size_bias": False, "positions": "original"}),
    ("calibration", "size bias, original positions", {"size_bias": True, "positions": "original"}),
    ("calibration", "size bias, median positions", {"size_bias": True, "positions": "median"}),
    ("calibration", "size and distance, mean positions", {ASK: spread.ask}),
    (
        "calibration",
        "size and distance, median positions",
        {"size_bias": True, "positions": "median", ASK: spread.ask},
    ),
    ("metric", "keys", {"metric": "keys"}),
    ("proportional attention", "off", {"proportional_attention": False}),
    ("means", "unweighted", {"weighted": False}),
    ("order", "energy order (tower)", {"stage": "tower", "restore_order": False}),
    ("placement", "after the layer", {"placement": "after_layer"}),
    ("stage", "tower", {"stage": "tower"}),
    ("stage", "projector", {"stage": "projector"}),
    ("tower layers", "all", {"layers": EVERY}),
    ("tower layers", "all, share 1/3", {"layers": EVERY, "tower_share": 1 / 3}),
    ("tower layers", "1, 3 and 5", {"layers": (1, 3, 5)}),
    ("tower layers", "1, 3 and 5, share 1/3", {"layers": (1, 3, 5), "tower_share": 1 / 3}),
    ("tower layers", "0 and 2", {"layers": (0, 2)}),
    ("tower layers", "1 and 3", {"layers": (1, 3)}),
    ("tower layers", "1 and 3, share 1/2", {"layers": (1, 3), "tower_share": 0.5}),
    ("tower layers", "1 and 3, share 1/3", {"layers": (1, 3), "tower_share": 1 / 3}),
    ("tower layers", "2 and 4", {"layers": (2, 4)}),
    ("tower layers", "2 and 4, in one round", {"algorithm": "one_round", "layers": (2, 4)}),
    ("tower layers", "2 and 4, share 1/2", {"layers": (2, 4), "tower_share": 0.5}),
    ("tower layers", "2 and 4, share 1/3", {"layers": (2, 4), "tower_share": 1 / 3}),
    (
        "tower layers",
        "1 and 3, share 1/3, median positions",
        {"layers": (1, 3), "tower_share": 1 / 3, "positions": "median"},
    ),
    ("tower share", "1/2", {"tower_share": 0.5}),
    ("tower share", "3/4", {"tower_share": 0.75}),
    ("energy", "elu", {"energy": "elu"}),
    ("energy", "gaussian", {"energy": "gaussian"}),
    ("margin", "0", {"margin": 0.0}),
    ("margin", "0.45", {"margin": 0.45}),
    ("margin", "0.9", {"margin": 0.9}),
    ("algorithm", "tome", {"algorithm": "tome"}),
    ("algorithm", "tome, hidden states", {"algorithm": "tome", "metric": "hidden"}),
    ("algorithm", "pitome", {"algorithm": "pitome"}),
    ("algorithm", "pitome, hidden states", {"algorithm": "pitome", "metric": "hidden"}),
    ("algorithm", "divprune", {"algorithm": "divprune"}),
    ("algorithm", "energy_select", {"algorithm": "energy_select"}),
    ("split", "pitome, random", {"algorithm": "pitome", "metric": "hidden", "split": "random"}),
    ("split", "pitome, high/low", {"algorithm": "pitome", "metric": "hidden", "split": "high_low"}),
    ("protect", "pitome, none", {"algorithm": "pitome", "metric": "hidden", "protect": False}),
)
BASELINE = MergeConfig(keep=1.0, algorithm="none")


def keep_lowest_energy(keys: Tensor, n_out: int, *, ctx: MergeContext) -> MergePlan:
    """What the paper's energy is worth without its matching: the least redundant tokens stay.

    Args:
        keys: [B, N, D].
        n_out: 1..N tokens of lowest energy to keep, of equal ones the earlier.
        ctx: relative depth.
    """
    similarity = Similarity(keys, ctx.pairs)
    order = energies(similarity, EnergyOptions(), ctx.depth).argsort(dim=-1, stable=True)
    return keep_only(similarity, order[:, :n_out])


ENERGY_SELECT = Algorithm(
    name="energy_select",
    plan=keep_lowest_energy,
    source="PiToMe's energy (arXiv 2405.16148, eq. 3-4) as a selection score, ours",
    pairwise=False,
    one_step=True,
    # No attention follows the one step in the last layer.
    proportional_attention=False,
    # On the bundled model (400 validation questions) it depends on the budget: 89.0 with
    # against 64.5 without at 36 of 144 tokens, 43.8 against 49.8 at 18.
    calibrated=False,
)


def in_one_round(keys: Tensor, n_out: int, *, ctx: MergeContext) -> MergePlan:
    """What the rounds of pitome_plus are worth: half of the tokens at once, coverage beyond that.

    Args:
        keys: [B, N, D].
        n_out: 1..N.
        ctx: relative depth, and whether the tower is over.
    """
    similarity = Similarity(keys, ctx.pairs)
    if ctx.at_projector or 2 * n_out < keys.shape[1]:
        return pitome_plus.coverage(similarity, n_out)
    return pitome_plus.matching(similarity, n_out, ctx)


ONE_ROUND = dataclasses.replace(
    pitome_plus.ALGORITHM, name="one_round", plan=in_one_round, pairs_compared=every_pair
)


# What the table has that the package has not.
OWN_ALGORITHMS = (ENERGY_SELECT, ONE_ROUND)


class Cell(NamedTuple):
    """One number of the table: its row, the key it is stored under, the options, how to ask."""

    row: tuple[str, str]
    key: str
    setting: Setting
    answers_of: Callable[..., list[str]]

    def varies(self, groups: list[str] | None) -> bool:
        """Whether it is asked for; what all are compared with always is."""
        return groups is None or self.row[0] in (*groups, "unreduced", "default")


def cells(used_layers: int) -> Iterator[Cell]:
    """Every cell of the table; the unreduced model first.

    Args:
        used_layers: of the tower that are run. Rows of layers that it has not are left out.
    """
    yield Cell(("unreduced", ""), "unreduced", Setting("no reduction", BASELINE), ask)
    for group, value, options in ROWS:
        chosen = {name: option for name, option in options.items() if name != ASK}
        if chosen.get("layers") == EVERY:
            chosen["layers"] = tuple(range(used_layers))
        if max(chosen.get("layers", (0,))) >= used_layers:
            continue
        for tokens in BUDGETS:
            config = MergeConfig.from_dict({"tokens": tokens, **chosen})
            setting = Setting(f"{group}: {value}", config)
            key = f"{group}/{value}/{tokens}"
            yield Cell((group, value), key, setting, options.get(ASK, ask))


def complete_rows(results: dict[str, Any]) -> set[tuple[str, str]]:
    """(group, value) of the rows whose cells are all measured and still hold."""
    known = results["cells"]
    rows: set[tuple[str, str]] = set()
    gaps: set[tuple[str, str]] = set()
    for cell in cells(results["used_layers"]):
        rows.add(cell.row)
        if cell.key not in known or not holds(known[cell.key], cell.setting.config):
            gaps.add(cell.row)
    return rows - gaps
