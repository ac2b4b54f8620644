# SPDX-License-Identifier: Apache-2.0
"""Shared by the pretraining stages: the optimizer pair, the schedule, logs and checkpoints."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chunkgrpo.shapes.muon import Muon


@dataclass(frozen=True)
class Round:
    """A part of the schedule: warm-up, constant rate, and a linear fall to zero.

    Attributes:
        steps: Optimizer steps.
        peak: Constant rate as a share of the optimizers' rates.
        fall: Share of the steps over which the rate falls.
        batch_size: Samples per step.
    """

    steps: int
    peak: float = 1.0
    fall: float = 0.35
    batch_size: int = 64


def round_of(rounds: Sequence[Round], step: int) -> tuple[Round, int]:
    """Return the round that a step belongs to, and the step's number within it.

    Raises:
        ValueError: If the rounds are over by then.
    """
    left = step
    for part in rounds:
        if left < part.steps:
            return part, left
        left -= part.steps
    raise ValueError(f"step {step} is past the last of {sum(part.steps for part in rounds)} steps")


class OptimizerPair:
    """Muon for hidden matrices, AdamW for everything else, one learning-rate factor for both.

    Args:
        named: Parameters by name.
        muon_lr, adam_lr: Peak learning rates.
        rounds: The schedule, one round after the other.
        warmup: Steps of the linear warm-up of each round.
        not_hidden: Name fragments of weights that AdamW keeps although they are matrices
            (embeddings, input and output layers).
    """

    def __init__(
        self,
        named: Iterable[tuple[str, Tensor]],
        muon_lr: float,
        adam_lr: float,
        rounds: Sequence[Round],
        warmup: int,
        not_hidden: tuple[str, ...],
    ) -> None:
        muon: list[Tensor] = []
        adam: list[Tensor] = []
        for name, weight in named:
            hidden = weight.ndim >= 2 and not any(part in name for part in not_hidden)
            (muon if hidden else adam).append(weight)
        self.muon = Muon(muon, lr=muon_lr, weight_decay=0.01)
        self.adam = torch.optim.AdamW(adam, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0)
        self.peaks = (muon_lr, adam_lr)
        self.rounds, self.warmup = tuple(rounds), warmup

    def factor(self, step: int) -> float:
        """Return the learning-rate factor of a step, 0 to 1; 0 after the last round."""
        if step >= sum(part.steps for part in self.rounds):
            return 0.0
        part, step = round_of(self.rounds, step)
        fall = (part.steps - step) / (part.fall * part.steps)
        return part.peak * min((step + 1) / self.warmup, fall, 1.0)

    def step(self, step: int) -> None:
        """Take one step of both optimizers at the scheduled rate."""
        for optimizer, peak in zip((self.muon, self.adam), self.peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * self.factor(step)
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Return both states."""
        return {"muon": self.muon.state_dict(), "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore both states."""
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])


class Average:
    """Exponential moving average of a module's parameters, with a warm-up of its memory.

    Args:
        module: The module to follow.
        decay: Share of the average kept per step once warmed up.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {k: v.detach().clone().float() for k, v in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move the average towards the module's present weights."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in module.named_parameters():
            self.values[name].lerp_(value.detach().float(), 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Write the average into a module."""
        for name, value in module.named_parameters():
            value.copy_(self.values[name])


class StageLog:
    """Prints progress and appends it to a JSON-lines log."""

    def __init__(self, path: Path, stage: str, total_steps: int) -> None:
        self.path, self.stage, self.total_steps = path, stage, total_steps
        self.started = time.perf_counter()
        self.first_step: int | None = None

    def write(self, step: int, **values: float) -> None:
        """Record one line; seconds count from the start (or resumption) of the stage."""
        if self.first_step is None:
            self.first_step = step
        seconds = time.perf_counter() - self.started
        rate = (step - self.first_step) / seconds if step > self.first_step else 0.0
        left = (self.total_steps - step) / rate / 60 if rate else float("nan")
        record = {"stage": self.stage, "step": step, "seconds": round(seconds, 1)}
        record |= {k: round(v, 5) for k, v in values.items()}
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        text = "  ".join(f"{k} {v:.4g}" for k, v in values.items())
        print(f"{self.stage} {step}/{self.total_steps}  {text}  {left:.1f} min left", flush=True)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)
