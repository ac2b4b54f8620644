# SPDX-License-Identifier: Apache-2.0
"""Print the peak memory of one update for chunks of 1, 4, 8 and 16 steps: it should not grow."""

from __future__ import annotations

import argparse
import dataclasses

import torch

from chunkgrpo.algorithms.chunk_grpo import ChunkGRPO
from chunkgrpo.algorithms.chunk_loss import ChunkLoss
from chunkgrpo.algorithms.chunk_update import Chunks, Evaluator
from chunkgrpo.algorithms.pairs import MicroBatch
from chunkgrpo.core import FlowDiffusion, Transition, UniformSelection, equal_plan, make_sigmas
from chunkgrpo.policies.adaptation import Adaptation
from chunkgrpo.policies.pipeline import GenerationOptions
from chunkgrpo.policies.sd3 import StableDiffusion3Policy
from chunkgrpo.rollout import Sampler
from chunkgrpo.runtime.memory import peak_memory
from chunkgrpo.shapes.build import PipelineSize, build_pipeline
from chunkgrpo.types import Experience

SIZES = (1, 4, 8, 16)
STEPS = 16  # trained ones
SIZE = PipelineSize(width=64, layers=4, head_dim=16, clip_width=16, clip_layers=2, t5_width=32)


def build_policy(device: str, size: PipelineSize = SIZE) -> StableDiffusion3Policy:
    """Build a small policy with random weights."""
    pipe = build_pipeline(size).to(device)
    adaptation, generation = Adaptation(rank=8, alpha=8.0), GenerationOptions(max_sequence_length=4)
    return StableDiffusion3Policy(pipe, adaptation, generation=generation, precision="fp32")


def direct_loss(
    policy: StableDiffusion3Policy, algorithm: ChunkGRPO, experience: Experience
) -> torch.Tensor:
    """Return the loss with each chunk in one piece of graph: the plain way, for comparison."""
    trajectory, plan = experience.trajectory, algorithm.plan
    chunks = Chunks(plan, algorithm.selection, algorithm.transition)
    evaluator = Evaluator(algorithm.loss, policy, trajectory, chunks)
    steps = torch.arange(plan.num_steps)
    total = torch.zeros((), device=policy.device)
    for sample in range(trajectory.num_samples):
        for part in steps.split(list(plan.sizes)):
            (pairs,) = MicroBatch.place([(torch.full_like(part, sample), part)], trajectory)
            change = evaluator.log_prob(pairs, evaluator.transition(pairs))
            change = change - trajectory.old_log_prob[pairs.pairs]
            loss = -experience.advantages[sample] * change.mean().exp()
            # One chunk at a time, as an implementation would that steps through chunks.
            (loss / (trajectory.num_samples * plan.num_chunks)).backward()
            total += loss.detach()
    return total


def measure(
    policy: StableDiffusion3Policy, sizes: tuple[int, ...], samples: int, micro_batch: int
) -> list[tuple[int, int, int]]:
    """Return chunk size, and the peak bytes of one update: this library's and the direct way's."""
    transition = Transition(FlowDiffusion(0.7))
    sampler = Sampler(transition, make_sigmas(STEPS + 1))
    trajectory = sampler.rollout(policy, ["a red star"], samples, seeds=list(range(samples)))
    advantages = torch.linspace(-1, 1, samples, device=policy.device)
    experience = Experience(trajectory, advantages)
    algorithm = ChunkGRPO(
        equal_plan(1, STEPS),
        transition,
        ChunkLoss(updates=1, micro_batch=micro_batch),
        UniformSelection(1.0),
    )
    rows = []
    for size in sizes:
        chosen = dataclasses.replace(algorithm, plan=equal_plan(size, STEPS))

        def update(chosen: ChunkGRPO = chosen) -> None:
            for part in chosen.losses(policy, experience, torch.Generator().manual_seed(0)):
                part.backward()

        def direct(chosen: ChunkGRPO = chosen) -> None:
            direct_loss(policy, chosen, experience)

        peaks = []
        for work in (update, direct):
            work()  # gradients exist before anything is measured
            peaks.append(peak_memory(work, policy.device))
        rows.append((size, *peaks))
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--micro-batch", type=int, default=4)
    options = parser.parse_args()
    policy = build_policy(options.device)
    found = measure(policy, SIZES, options.samples, options.micro_batch)
    print(f"Peak memory of one update beside weights, {STEPS} steps, {options.device}, MiB")
    print(f"| steps a chunk | micro-batches of {options.micro_batch} | a chunk at once |")
    print("|---|---|---|")
    for size, ours, direct in found:
        print(f"| {size} | {ours / 2**20:.2f} | {direct / 2**20:.2f} |")
    first = found[0][1]
    growth = max(ours for _, ours, _ in found) / first - 1
    print(f"The peak of the longest chunks is {100 * growth:+.1f} % of that of single steps.")


if __name__ == "__main__":
    main()
