# SPDX-License-Identifier: Apache-2.0
"""Measure how much of one rollout's gradient is signal, for several settings of the demo.

A rollout's gradient is g = s + n, with s the same for all rollouts and n of mean zero. Of K
independent rollouts of the untrained model,

    signal     |s|^2 = mean of <g_i, g_j> over i != j          (unbiased)
    power      E|g|^2 = mean of <g_i, g_i>

and power / signal is about how many rollouts it takes until the mean gradient is half signal.
Products are those of a gradient and the step that Adam would make of another: each weight counts
by 1 over its root mean square gradient in all cases.

Signal of one case may point elsewhere than that of another (more noise while sampling is another
objective). So ``aligned`` is the cosine between one rollout's gradient and the mean gradient of
all other cases: the part of a step that all cases agree on. Its square per second is what a case
learns in a time, and ``rate`` that relative to the first case. Seconds are processor seconds, so
other work on the machine does little harm.

Nothing is trained. A case is NAME KEY=VALUE ..., the keys those of a recipe; without any, noise
levels, group sizes and windows of the demo are compared.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from chunkgrpo.config import load_config
from chunkgrpo.config.build import build_trainer
from chunkgrpo.train.metrics import UpdateLog

CASES = (
    "demo",
    "eta-0.7 sampling.transition.eta=0.7",
    "eta-1.4 sampling.transition.eta=1.4",
    "eta-2 sampling.transition.eta=2.0",
    "32-prompts-of-6 sampling.prompts=32 sampling.group_size=6",
    "by-spread credit.convention=group_std",
    "every-image credit.keep=1",
    "nothing-held watched_rewards=[] credit.project_out=[]",
    "steps-3-to-4 objective.window.size=2 objective.plan.sizes=[2] objective.selection.indices=[0]",
    "steps-2-to-4 objective.window.start=2",
)
# One update, at ratio 1: neither the clip nor the pull to the base has begun.
FIXED = ("objective.updates=1", "objective.kl=none", "evaluation.every=0", "threads=1")


@dataclass(frozen=True)
class Case:
    """One setting's gradients.

    Attributes:
        name: Of the case.
        gradients_KD: One row a rollout, float32.
        seconds: Processor seconds of one rollout with its gradient.
    """

    name: str
    gradients_KD: Tensor
    seconds: float


def measure(name: str, settings: Sequence[str], rollouts: int, seed: int) -> Case:
    """Take the gradients of independent rollouts of the model as it is."""
    config = load_config("demo", [*FIXED, f"seed={seed}", "iterations=1000000", *settings])
    with TemporaryDirectory() as folder:
        trainer = build_trainer(config, Path(folder))
        gradients: list[Tensor] = []

        def taken(log: UpdateLog) -> None:
            # Where no image of a rollout pulls, there are no gradients.
            parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in trainer.parameters]
            gradients.append(torch.cat([part.flatten() for part in parts]).float())
            trainer.optimizer.zero_grad(set_to_none=True)
            log.ended(gradients[-1].norm())

        trainer.update = taken  # type: ignore[method-assign] # nothing moves
        trainer.train_once()  # the first pays for loading
        gradients.clear()
        started = time.process_time()
        for trainer.iteration in range(1, rollouts + 1):  # other prompts, other noise
            trainer.train_once()
        return Case(name, torch.stack(gradients), (time.process_time() - started) / rollouts)


def signal_of(products_KK: Tensor) -> tuple[float, float, float]:
    """Return |s|^2, its standard error, and E|g|^2 from inner products of gradients.

    The error takes products of different pairs to be uncorrelated, as they are for pure noise.
    """
    number = len(products_KK)
    row, column = torch.triu_indices(number, number, offset=1)
    pairs = products_KK[row, column]
    error = pairs.std() / len(pairs) ** 0.5
    return float(pairs.mean()), float(error), float(products_KK.diagonal().mean())


def aligned(gradients_KD: Tensor, direction_D: Tensor) -> tuple[float, float]:
    """Return the mean cosine of gradients (by their common length) and a direction, its error."""
    along_K = gradients_KD @ direction_D / direction_D.norm()
    length = gradients_KD.square().sum(1).mean().sqrt()
    number = len(along_K)
    return float(along_K.mean() / length), float(along_K.std() / length / number**0.5)


def table(cases: Sequence[Case]) -> str:
    """Return a line a case."""
    every = [case.gradients_KD for case in cases]
    size_D = torch.stack([g.square().mean(0) for g in every]).mean(0).sqrt()
    scale_D = (size_D + 1e-3 * size_D.mean()).sqrt()  # of both factors of a product
    scaled = [g / scale_D for g in every]
    means = [g.mean(0) for g in scaled]
    together_D = torch.stack(means).sum(0)
    lines = [
        "| case | seconds a rollout | power / signal | signal / its error | aligned | rate |",
        "|---|---|---|---|---|---|",
    ]
    first = None
    for case, g_KD, mean_D in zip(cases, scaled, means, strict=True):
        signal, error, power = signal_of(g_KD @ g_KD.T)
        cosine, spread = aligned(g_KD, together_D - mean_D)
        rate = cosine**2 / case.seconds
        first = first or rate
        ratio = f"{power / signal:.0f}" if signal > 0 else "unknown"
        lines.append(
            f"| {case.name} | {case.seconds:.2f} | {ratio} | {signal / error:.1f} "
            f"| {cosine:.3f} ({1.96 * spread:.3f}) | {rate / first:.2f} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all cases and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--case", action="append", help="NAME KEY=VALUE ..., at least two of them")
    add("--rollouts", type=int, default=20, help="of each case, at least 3")
    add("--set", action="append", default=[], help="a setting of all cases")
    options = parser.parse_args(arguments)
    named = options.case or list(CASES)
    if len(named) < 2 or options.rollouts < 3:
        parser.error("it takes two cases to align and three rollouts to measure a signal")
    cases = []
    for seed, each in enumerate(named):
        name, *settings = each.split()
        cases.append(measure(name, [*options.set, *settings], options.rollouts, seed))
        print(f"{name}: {cases[-1].seconds:.2f} s a rollout", flush=True)
    print(f"{options.rollouts} rollouts a case; in brackets half the 95 % interval")
    print(table(cases))


if __name__ == "__main__":
    main()
