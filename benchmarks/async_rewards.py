# SPDX-License-Identifier: Apache-2.0
"""What overlapping rollout and reward saves when the reward is as slow as the rollout.

The reward is the embedded world's verifier followed by a pause, as of a server elsewhere that works
as long as the rollout takes here. The same iterations run with and without overlap, for rollout
batches of several sizes: the first batch has nothing to overlap with, so n batches can hide
(n - 1) / n of the reward at most. Weights have to agree bit for bit.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from chunkgrpo.config import build_trainer, load_config
from chunkgrpo.rewards import make_reward
from chunkgrpo.train import Trainer


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
    trainer.rewards = [(SlowReward(seconds_an_image), 1.0)]
    return trainer


def run(trainer: Trainer, iterations: int) -> tuple[dict[str, float], list[torch.Tensor]]:
    """Train; return the median seconds of each phase and the weights."""
    records: list[dict[str, Any]] = []
    for _ in range(iterations):
        records.append(trainer.train_once())
        trainer.iteration += 1
    phases = [record["phase_seconds"] for record in records]
    seconds = {name: median(phase[name] for phase in phases) for name in phases[0]}
    return seconds, [p.detach().clone() for p in trainer.parameters]


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
    for column in ("rollout batch", "rollout", "reward", "total", "overlapped", "saved", "same"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for batch in batches:
            probe = build(folder, batch, False, 0.0, settings)
            run(probe, 1)  # the first iteration also loads and encodes
            first, _ = run(probe, 1)
            num_images = (2 if options.quick else 8) * group_size
            seconds = (first["rollout"] + first["decode"]) / num_images
            plain, weights = run(build(folder, batch, False, seconds, settings), iterations)
            hidden, other = run(build(folder, batch, True, seconds, settings), iterations)
            total, overlapped = sum(plain.values()), sum(hidden.values())
            same = all(torch.equal(a, b) for a, b in zip(weights, other, strict=True))
            numbers = (plain["rollout"] + plain["decode"], plain["reward"], total, overlapped)
            table.add_row(
                str(batch),
                *(f"{number:.2f}" for number in numbers),
                f"{100 * (total - overlapped) / total:.0f} %",
                "yes" if same else "NO",
            )
            if not same:
                raise SystemExit(f"rollout batch {batch}: overlapped scoring changed the weights")
    Console(width=None if Console().is_terminal else 100).print(table)
    print("rollout includes decoding; total includes training; same: weights equal bit for bit.")
    if options.quick:
        print("These sizes are a check that everything runs, not a measurement.")


if __name__ == "__main__":
    main()
