# SPDX-License-Identifier: Apache-2.0
"""The cost of an iteration in network rows, by running the real sampler and algorithm.

No formula repeats what the code does. A policy of one weight stands in for the model and counts the
rows it is evaluated on. Rewards are random numbers, so that every group has spread; weights do not
change, so that no ratio leaves its trust region.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from chunkgrpo.algorithms.chunk_grpo import ChunkGRPO
from chunkgrpo.algorithms.protocol import Algorithm
from chunkgrpo.config.build import build_algorithm, build_sampler
from chunkgrpo.config.derived import merge_sizes, num_planned
from chunkgrpo.config.schema import ChunkGRPOObjective, Config, chunk_objective
from chunkgrpo.core.plan_rules import AdaptivePlan, ExplicitPlan, OptimalPlan
from chunkgrpo.core.schedules import make_sigmas, merge_sigmas
from chunkgrpo.policies.toy import CountingPolicy
from chunkgrpo.rewards.scoring import Scorer
from chunkgrpo.rollout import Sampler
from chunkgrpo.train.collecting import Collector
from chunkgrpo.train.metrics import PhaseClock
from chunkgrpo.types import Experience, Prompt

DRAWS = 4
"""Iterations that are averaged over, since the selection of chunks may be random."""


@dataclass(frozen=True)
class Cost:
    """Network rows of one iteration: one row is one latent at one noise level.

    Attributes:
        rollout: Forward, without gradient.
        measured: Forward, without gradient, while training: ratios of the updated policy, replay,
            reference, old policy.
        trained: Forward and backward.
        rewards: Images decoded and scored.
        pairs: (sample, step) pairs that are trained on; more than ``trained`` where samples of a
            prompt share a row.
        stored: Bytes that are stored for training, per latent element of a sample.
    """

    rollout: float
    measured: float
    trained: float
    rewards: float
    pairs: float
    stored: float

    @property
    def forwards(self) -> int:
        """All network rows that are evaluated; each backward costs about two more."""
        return round(self.rollout + self.measured + self.trained)


def iteration_cost(config: Config) -> Cost:
    """Return the cost of one iteration, averaged over random choices.

    A window that moves is counted at each of its places, weighted by the share of the iterations.
    Clipped chunks and groups without spread make a real iteration cheaper.

    Args:
        config: A checked configuration. Plans that are cut from a model's dynamics are replaced by
            nearly equal chunks.
    """
    config = with_known_chunks(config)
    policy = CountingPolicy()
    sigmas, sizes = make_sigmas(config.sampling.steps), merge_sizes(config)
    sampler = build_sampler(config, merge_sigmas(sigmas, sizes) if sizes else sigmas)
    algorithm = build_algorithm(config, policy, sampler, lambda distance: sigmas)
    counted = [
        (share / DRAWS, _counted(config, policy, sampler, placed, draw))
        for placed, share in _places(algorithm)
        for draw in range(DRAWS)
    ]
    return Cost(*(sum(share * row[i] for share, row in counted) for i in range(6)))


def _places(algorithm: Algorithm) -> list[tuple[Algorithm, float]]:
    """Return the algorithm with its window at each place, and the share of the iterations there."""
    if not isinstance(algorithm, ChunkGRPO):
        return [(algorithm, 1.0)]
    places = algorithm.window.places(algorithm.plan, algorithm.steps)
    return [(replace(algorithm, window=window), share) for window, share in places.items()]


def _counted(
    config: Config, policy: CountingPolicy, sampler: Sampler, algorithm: Algorithm, draw: int
) -> tuple[float, ...]:
    """Run one iteration; return the fields of :class:`Cost`."""
    s, generator = config.sampling, Generator().manual_seed(draw)
    scorer = Scorer([(_Random("reward"), 1.0)], [_Random(n) for n in config.credit.project_out])
    collector = Collector(policy, sampler, scorer, s.group_size, by_chunk=config.credit.by_chunk)
    prompts = [Prompt(f"prompt {p}") for p in range(s.prompts)]
    policy.reset()
    request = algorithm.begin(0, generator)
    with algorithm.sampling(policy):
        trajectory, scores = collector.collect(
            prompts, request, generator, PhaseClock(policy.device)
        )
    rollout, scored = policy.quiet_rows, policy.decoded
    advantages = config.credit(scores, s.prompts, algorithm.updates)
    experience = Experience(trajectory, advantages.values, advantages.chosen)
    pairs = 0
    for part in algorithm.losses(policy, experience, generator):
        pairs += len(part.diagnostics.get("sample", ())) - len(part.diagnostics.get("skipped", ()))
    stored = trajectory.states.nbytes
    stored += 0 if trajectory.velocities is None else trajectory.velocities.nbytes
    measured = policy.quiet_rows - rollout
    return rollout, measured, policy.trained_rows, scored, pairs, stored / s.images


class _Random:
    """A reward whose scores differ between images and are the same at every call."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return a function of each image's mean, which its own noise determines."""
        salt = sum(map(ord, self.name))
        return torch.sin(1e3 * (images.double().flatten(1).mean(1) + salt)).float()


def with_known_chunks(config: Config) -> Config:
    """Return the configuration with a measured plan replaced by nearly equal chunks."""
    o = config.objective
    if not isinstance(o, ChunkGRPOObjective) or not o.plan.measured:
        return config
    plan = ExplicitPlan(chunk_sizes(config))
    return config.model_copy(update={"objective": replace(o, plan=plan)})


def chunk_sizes(config: Config) -> tuple[int, ...]:
    """Chunk sizes; of a measured plan, those of nearly equal chunks."""
    o, steps = chunk_objective(config), num_planned(config)
    if not isinstance(o.plan, AdaptivePlan | OptimalPlan):
        return o.plan.plan(steps).sizes
    number = o.plan.num_chunks_of(steps) or max(1, min(4, steps // o.plan.min_size))
    size, longer = divmod(steps, number)
    return (size,) * (number - longer) + (size + 1,) * longer
