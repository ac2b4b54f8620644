# SPDX-License-Identifier: Apache-2.0
"""What overlapping rollout and reward saves when the reward is as slow as the rollout.

The reward is the embedded world's verifier followed by a pause, as of a server elsewhere that works
as long as the rollout takes here. The same iterations run with and without overlap, for rollout
batches of several sizes: the first batch has nothing to overlap with, so n batches can hide
(n - 1) / n of the reward at most. Iterations with and without overlap alternate, and each ratio is
the median over such pairs, so that a machine that slows down slows both. Weights have to agree bit
for bit.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from chunkgrpo.config import load_config
from chunkgrpo.config.build import build_trainer
from chunkgrpo.rewards import make_reward
from chunkgrpo.train.loop import Trainer


class SlowReward:
    """The verifier's score, after a pause for each image."""

    name = "slow"

    def __init__(self, seconds_an_image: float) -> None:
        self.seconds, self.inner = seconds_an_image, make_reward("shapes")

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Score images."""
        time.sleep(self.seconds * len(images))
        return self.inner(images, prompts)


def build(
    folder: Path, batch: int, overlap: bool, seconds_an_image: float, settings: Sequence[str]
) -> Trainer:
    """Return a trainer of the demo."""
    own = [f"sampling.batch_size={batch}", f"async_rewards={str(overlap).lower()}"]
    trainer = build_trainer(load_config("demo", [*settings, *own]), folder)
    slow = SlowReward(seconds_an_image)
    trainer.scorer = replace(trainer.scorer, rewards=[(slow, 1.0)])
    return trainer


def iterate(trainer: Trainer) -> dict[str, float]:
    """Train once; return the seconds of each phase, and of all as ``total``."""
    record: dict[str, Any] = trainer.train_once()
    trainer.iteration += 1
    phases = record["phase_seconds"]
    return phases | {"total": sum(phases.values())}


def weights(trainer: Trainer) -> list[torch.Tensor]:
    """Return the trained weights."""
    return [p.detach().clone() for p in trainer.parameters]


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="few images; a check that it runs")
    parser.add_argument("--iterations", type=int, default=3)
    options = parser.parse_args()
    settings = ["sampling.prompts=8", "evaluation.every=0"]
    group_size, batches, iterations = 12, (96, 48, 24, 12), options.iterations
    if options.quick:
        settings += ["sampling.prompts=2", "sampling.group_size=4"]
        group_size, batches, iterations = 4, (4,), 1
    else:
        settings += [f"sampling.group_size={group_size}"]
    table = Table(title="One iteration, seconds (median)")
    for column in ("rollout batch", "rollout", "reward", "total", "overlapped", "ratio", "same"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for batch in batches:
            probe = build(folder, batch, False, 0.0, settings)
            iterate(probe)  # the first iteration also loads and encodes
            first = iterate(probe)
            num_images = (2 if options.quick else 8) * group_size
            seconds = (first["rollout"] + first["decode"]) / num_images
            plain = build(folder, batch, False, seconds, settings)
            hidden = build(folder, batch, True, seconds, settings)
            if not options.quick:
                for trainer in (plain, hidden):
                    iterate(trainer)  # as above
            pairs = [(iterate(plain), iterate(hidden)) for _ in range(iterations)]
            same = all(
                torch.equal(a, b) for a, b in zip(weights(plain), weights(hidden), strict=True)
            )
            numbers = (
                median(p["rollout"] + p["decode"] for p, _ in pairs),
                median(p["reward"] for p, _ in pairs),
                median(p["total"] for p, _ in pairs),
                median(h["total"] for _, h in pairs),
                median(p["total"] / h["total"] for p, h in pairs),
            )
            table.add_row(
                str(batch), *(f"{number:.2f}" for number in numbers), "yes" if same else "NO"
            )
            if not same:
                raise SystemExit(f"rollout batch {batch}: overlapped scoring changed the weights")
    Console(width=None if Console().is_terminal else 100).print(table)
    print(
        "rollout includes decoding; total and overlapped include training; ratio: total over\n"
        "overlapped, median over pairs measured in turns; same: weights equal bit for bit."
    )
    if options.quick:
        print("These sizes are a check that everything runs, not a measurement.")


if __name__ == "__main__":
    main()
