"""Ranks, the optimiser and the clock.

Knows how two single-thread processes share a step and how long a stage has been running. Does
not know models or data.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

LOG = logging.getLogger("demo_model")
SAVE_SECONDS = 120

Named = Iterable[tuple[str, nn.Parameter]]


def rank_and_ranks() -> tuple[int, int]:
    """This process's number and how many there are."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def start() -> tuple[int, int]:
    """Join the other ranks; returns (rank, ranks)."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    rank, ranks = rank_and_ranks()
    if ranks > 1:
        dist.init_process_group("gloo")
    return rank, ranks


def named_of(module: nn.Module) -> Named:
    """The parameters that are to be trained."""
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]


def orthogonalise(update: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz: push the singular values of a batch of matrices towards one (Muon)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = update.shape[-2] > update.shape[-1]
    x = update.mT if tall else update
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Optimiser:
    """Muon for the matrices of the layers, AdamW for the rest, gradients averaged over ranks."""

    def __init__(self, named: Named, matrix_rate: float, other_rate: float, ranks: int) -> None:
        named = [(n, p) for n, p in named if p.requires_grad]
        self.parameters = [p for _, p in named]
        self.ranks = ranks
        self.matrix_rate, self.other_rate = matrix_rate, other_rate
        groups: dict[tuple[int, ...], list[nn.Parameter]] = {}
        others: list[nn.Parameter] = []
        for name, p in named:
            if p.ndim == 2 and ".layers." in name and matrix_rate > 0:
                groups.setdefault(tuple(p.shape), []).append(p)
            else:
                others.append(p)
        self.groups = list(groups.values())
        self.momenta = [torch.zeros(len(g), *g[0].shape) for g in self.groups]
        decayed = [p for p in others if p.ndim >= 2]
        plain = [p for p in others if p.ndim < 2]
        self.adam = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.02}, {"params": plain, "weight_decay": 0.0}],
            lr=other_rate,
            betas=(0.9, 0.98),
            foreach=True,
        )
        for p in self.parameters:
            if ranks > 1:
                dist.broadcast(p.data, 0)

    def step(self, scale: float, values: list[float]) -> list[float]:
        """One update with the rates times `scale`; returns `values` averaged over ranks."""
        flat = torch.cat(
            [
                p.grad.reshape(-1) if p.grad is not None else torch.zeros(p.numel())
                for p in self.parameters
            ]
            + [torch.tensor(values)]
        )
        if self.ranks > 1:
            dist.all_reduce(flat)
            flat /= self.ranks
        norm = float(flat[: -len(values)].norm())
        clip = min(1.0, 2.0 / (norm + 1e-6))
        offset = 0
        for p in self.parameters:
            p.grad = flat[offset : offset + p.numel()].view_as(p) * clip
            offset += p.numel()
        for group in self.adam.param_groups:
            group["lr"] = self.other_rate * scale
        self.adam.step()
        self._muon(self.matrix_rate * scale)
        for p in self.parameters:
            p.grad = None
        return [*flat[-len(values) :].tolist(), norm]

    @torch.no_grad()
    def _muon(self, rate: float) -> None:
        for group, momentum in zip(self.groups, self.momenta, strict=True):
            gradient = torch.stack([p.grad for p in group])
            momentum.lerp_(gradient, 0.05)
            update = orthogonalise(gradient.lerp(momentum, 0.95))
            # 0.2 * sqrt(larger side): the same step size per weight as AdamW would take.
            update *= 0.2 * max(update.shape[-2:]) ** 0.5
            for p, u in zip(group, update, strict=True):
                p.mul_(1 - 0.02 * rate).sub_(u, alpha=rate)

    def state(self) -> dict[str, Any]:
        """What `restore` needs."""
        return {"adam": self.adam.state_dict(), "momenta": self.momenta}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue with stored moments."""
        self.adam.load_state_dict(state["adam"])
        self.momenta = state["momenta"]


class Clock:
    """How much of a stage's processor time is used up, agreed between ranks, across restarts.

    Processor time, so that a run next to other work makes as many steps as one alone.
    """

    def __init__(self, minutes: float, ranks: int, spent: float = 0.0) -> None:
        self.total, self.ranks, self.begin = minutes * 60, ranks, time.process_time() - spent

    def spent(self) -> float:
        """Seconds used so far."""
        return time.process_time() - self.begin

    def fraction(self) -> float:
        """The used part of the time, the same number on every rank."""
        value = torch.tensor([self.spent() / self.total])
        if self.ranks > 1:
            dist.broadcast(value, 0)
        return float(value)


def scale_at(fraction: float, step: int, warm_up: int = 60, flat: float = 0.3) -> float:
    """Warm up, stay, then fall linearly to 2 %."""
    fall = min(1.0, max(0.0, (fraction - flat) / (1 - flat)))
    return min(1.0, (step + 1) / warm_up) * (1 - 0.98 * fall)


class Loop:
    """The order of the scenes, the clock, the log and the checkpoints of one training stage."""

    def __init__(self, path: Path, modules: dict[str, nn.Module], rates: tuple[float, float]):
        self.path, self.modules = path, modules
        self.rank, self.ranks = rank_and_ranks()
        named = [(f"{m}.{n}", p) for m, module in modules.items() for n, p in named_of(module)]
        self.optimiser = Optimiser(named, *rates, self.ranks)
        self.step, self.spent, self.seen = 0, 0.0, 0
        if path.exists():
            self._resume(torch.load(path))

    def _resume(self, stored: dict[str, Any]) -> None:
        for name, module in self.modules.items():
            module.load_state_dict(stored[name])
        self.optimiser.restore(stored["optimiser"])
        self.step, self.spent, self.seen = stored["step"], stored["spent"], stored["seen"]

    def run(
        self,
        minutes: float,
        batch: int,
        scenes: int,
        loss: Callable[[np.ndarray], tuple[Tensor, dict[str, Tensor]]],
        score: Callable[[bool], dict[str, float]],
    ) -> None:
        """Train until the time is used up; `score(final)` is logged at every checkpoint."""
        clock, last = Clock(minutes, self.ranks, self.spent), self.spent
        generator = np.random.default_rng([self.step, self.rank])
        order = np.empty(0, np.int64)
        while (fraction := clock.fraction()) < 1:
            if len(order) < batch:
                order = generator.permutation(scenes)
            chosen, order = np.sort(order[:batch]), order[batch:]
            total, parts = loss(chosen)
            total.backward()
            values = [float(value.detach()) for value in parts.values()]
            means = self.optimiser.step(scale_at(fraction, self.step), values)
            self.step, self.seen = self.step + 1, self.seen + batch * self.ranks
            self.spent = clock.spent()
            if self.rank == 0 and (self.step in (5, 10, 20, 40) or self.step % 50 == 0):
                self._log(dict(zip([*parts, "norm"], means, strict=True)))
            if self.rank == 0 and self.spent - last > SAVE_SECONDS:
                last = self.spent
                LOG.info("val %s", score(False))
                self.save()
        if self.rank == 0:
            self.save()
            LOG.info("done step %d images %d val %s", self.step, self.seen, score(True))

    def _log(self, means: dict[str, float]) -> None:
        shown = {name: round(value, 3) for name, value in means.items()}
        rate = self.seen / max(1e-9, self.spent)
        minutes = self.spent / 60
        LOG.info(
            "%.1f min step %d images %d (%.1f/s) %s", minutes, self.step, self.seen, rate, shown
        )

    def save(self) -> None:
        """Write everything needed to resume; killed halfway, the last checkpoint stays whole."""
        states = {name: module.state_dict() for name, module in self.modules.items()}
        progress = {"step": self.step, "spent": self.spent, "seen": self.seen}
        partial = self.path.with_suffix(".partial")
        torch.save({**states, **progress, "optimiser": self.optimiser.state()}, partial)
        partial.replace(self.path)
