# SPDX-License-Identifier: Apache-2.0
"""Train the demo with and without temporal consistency and print what the term changes.

The term pulls on how far an update moves the clean-image predictions of neighbouring chunks apart.
Measured are, for each training seed and weight:

- the term itself, in the second update of each iteration, mean over the run;
- drift: the same quantity between the tuned and the base model, on trajectories of the base;
- disagreement: mean square difference of neighbouring chunks' clean predictions along a model's
  own trajectories from the same noise, before and after;
- reward and strict score of the same held-out images before and after.

Weight 0 computes the term, too, with a weight too small to matter, so that both cost the same.
Finished runs are kept in the results file, and the next call goes on from there.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student
from torch import Tensor

from chunkgrpo.algorithms.chunk_grpo import ChunkGRPO
from chunkgrpo.config import load_config
from chunkgrpo.config.build import build_prompts, build_trainer
from chunkgrpo.core.plans import ChunkPlan
from chunkgrpo.core.sde import predict_clean
from chunkgrpo.rollout import Sampler
from chunkgrpo.runtime.files import atomic_write
from chunkgrpo.runtime.seeds import derive_seed
from chunkgrpo.train.loop import Trainer
from chunkgrpo.types import Trajectory

NOTHING = 1e-12
"""A weight whose gradient vanishes beside float32's rounding of the policy's."""


def clean_at_starts(trajectory: Trajectory, velocities: Tensor, plan: ChunkPlan) -> Tensor:
    """Clean predictions where each chunk begins, [B, C, D]."""
    starts = list(plan.starts)
    sigmas = trajectory.trained_sigmas[starts].view(1, -1, *[1] * (velocities.ndim - 2))
    clean = predict_clean(trajectory.states[:, starts], velocities[:, starts], sigmas)
    return clean.flatten(2)


def apart(clean_BCD: Tensor) -> Tensor:
    """Mean square difference of neighbouring chunks, [B]."""
    return clean_BCD.diff(dim=1).square().mean((1, 2))


class Probe:
    """Fixed held-out prompts and noises, and what the base model does with them."""

    def __init__(self, trainer: Trainer, prompts: Any, images: int) -> None:
        self.prompts, self.images = prompts, images
        algorithm, sampler = trainer.algorithm, trainer.sampler
        assert isinstance(algorithm, ChunkGRPO)
        window, self.plan = algorithm.begin(0, torch.Generator()).window, algorithm.present
        self.sampler = Sampler(
            sampler.transition, sampler.sigmas, window=window, keep_velocities=True
        )
        self.seeds = [derive_seed(7, i) for i in range(len(prompts) * images)]
        self.base = self.sampled(trainer)
        assert self.base.velocities is not None
        self.base_clean = clean_at_starts(self.base, self.base.velocities, self.plan)

    def sampled(self, trainer: Trainer) -> Trajectory:
        return self.sampler.rollout(
            trainer.policy, list(self.prompts), self.images, seeds=self.seeds
        )

    @torch.no_grad()
    def measure(self, trainer: Trainer) -> dict[str, float]:
        """Judge the policy as it is."""
        own = self.sampled(trainer)
        assert own.velocities is not None
        base, velocities = self.base, torch.zeros_like(own.velocities)
        for start in self.plan.starts:
            sigma = base.trained_sigmas[start].expand(base.num_samples)
            velocities[:, start] = trainer.policy.velocity(
                base.states[:, start], sigma, base.conditioning_of(slice(None))
            )
        moved = clean_at_starts(base, velocities, self.plan) - self.base_clean
        found = trainer.evaluate(self.prompts, self.images, seed=11)
        return {
            "disagreement": float(apart(clean_at_starts(own, own.velocities, self.plan)).mean()),
            "drift": float(apart(moved).mean()),
            "reward": found.mean(trainer.scorer.rewards[0][0].name),
            "strict": found.mean(trainer.evaluator.judge.name),
        }


def run_one(weight: float, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train once and measure before and after."""
    folder = options.out.parent / f"{options.out.stem}-unfinished"
    shutil.rmtree(folder, ignore_errors=True)
    settings = [
        f"seed={seed}", f"iterations={options.iterations}", f"sampling.prompts={options.prompts}",
        f"objective.consistency={max(weight, NOTHING)}", "evaluation.every=0",
        f"evaluation.final_prompts={options.probe}", *options.set,
    ]  # fmt: skip
    config = load_config("demo", settings)
    trainer = build_trainer(config, folder)
    probe = Probe(trainer, build_prompts(config, "final"), options.images)
    before = probe.measure(trainer)
    records: list[Any] = []
    trainer.on_iteration = records.append
    if not trainer.run():
        raise KeyboardInterrupt
    with trainer.averaged():
        after = probe.measure(trainer)
    shutil.rmtree(folder)
    term = [record["consistency"] for record in records]
    training = [record["reward_mean"] for record in records]
    return {
        "before": before, "after": after, "term": term, "training": training,
        "seconds": trainer.seconds,
    }  # fmt: skip


def interval(values: Sequence[float]) -> str:
    """Mean of independent training seeds with its 95 % t interval."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:.4g}"
    half = student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{mean:.4g} ({mean - half:.4g} to {mean + half:.4g})"


def table(results: dict[str, Any]) -> str:
    """Return a line a weight, and the difference of each from the first, seed by seed."""
    runs = results["runs"]
    lines = [
        "| weight | term in the second update | drift from the base | disagreement before "
        "| after | change of the reward | change of strict | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def values(weight: str) -> dict[str, list[float]]:
        found = [runs[weight][seed] for seed in sorted(runs[weight])]
        return {
            "term": [float(np.mean(run["term"])) for run in found],
            "drift": [run["after"]["drift"] for run in found],
            "before": [run["before"]["disagreement"] for run in found],
            "after": [run["after"]["disagreement"] for run in found],
            "reward": [run["after"]["reward"] - run["before"]["reward"] for run in found],
            "strict": [run["after"]["strict"] - run["before"]["strict"] for run in found],
            "seconds": [run["seconds"] for run in found],
        }

    weights = sorted(runs, key=float)
    for weight in weights:
        cells = [interval(column) for column in values(weight).values()]
        lines.append(f"| {weight} | {' | '.join(cells)} |")
    first = values(weights[0])
    for weight in weights[1:]:
        other = values(weight)
        if len(other["term"]) != len(first["term"]):
            continue
        cells = [interval(np.subtract(other[key], first[key]).tolist()) for key in first]
        lines.append(f"| {weight} less {weights[0]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--weights", type=float, nargs="+", default=[0.0, 1.0])
    add("--seeds", type=int, default=3, help="training seeds")
    add("--iterations", type=int, default=5)
    add("--prompts", type=int, default=8, help="prompts a rollout, 12 images each")
    add("--probe", type=int, default=48, help="held-out prompts to measure on")
    add("--images", type=int, default=2, help="images of each")
    add("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    add("--set", action="append", default=[], help="a setting of the demo")
    add("--out", type=Path, default=Path("runs/consistency.json"))
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    kept = ("iterations", "prompts", "probe", "images", "set")
    setup = {key: getattr(options, key) for key in kept}
    results: dict[str, Any] = {"setup": setup, "runs": {}}
    if options.out.exists():
        results = json.loads(options.out.read_text())
        if results["setup"] != setup:
            raise SystemExit(f"{options.out} holds {results['setup']}; choose another --out")
    # Both weights of a seed together, so that an early stop leaves whole pairs.
    for seed in range(options.seeds):
        for weight in options.weights:
            runs = results["runs"].setdefault(f"{weight:g}", {})
            if str(seed) not in runs:
                print(f"weight {weight:g}, seed {seed} ...", flush=True)
                runs[str(seed)] = run_one(weight, seed, options)
                atomic_write(options.out, json.dumps(results) + "\n")
    print(
        f"The demo, {options.iterations} iterations of {options.prompts} prompts; "
        f"{options.probe} held-out prompts x {options.images} images; mean and 95 % interval over "
        f"{options.seeds} training seeds"
    )
    print(table(results))


if __name__ == "__main__":
    main()
