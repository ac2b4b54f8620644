# SPDX-License-Identifier: Apache-2.0
"""One rollout and its scores; images may be scored while later ones are still being sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Generator, Tensor

from chunkgrpo.core.sde import predict_clean
from chunkgrpo.policies.protocol import Policy
from chunkgrpo.rewards.overlap import PendingScores, ScoringQueue
from chunkgrpo.rewards.scoring import Scorer
from chunkgrpo.rollout import Sampler
from chunkgrpo.train.metrics import PhaseClock
from chunkgrpo.types import Prompt, RewardBatch, SamplingRequest, Trajectory


@dataclass(frozen=True)
class Collector:
    """Samples groups of images and scores them.

    Attributes:
        policy: The policy that samples.
        sampler: How it samples.
        scorer: The rewards.
        group_size: G samples per prompt.
        overlap: Score in threads while later images are sampled; the scores are the same.
        by_chunk: Also score the clean predictions where chunks begin.
    """

    policy: Policy
    sampler: Sampler
    scorer: Scorer
    group_size: int
    overlap: bool = False
    by_chunk: bool = False

    def collect(
        self,
        prompts: Sequence[Prompt],
        request: SamplingRequest,
        generator: Generator,
        clock: PhaseClock,
        label: str = "",
    ) -> tuple[Trajectory, list[RewardBatch]]:
        """Sample and score.

        Args:
            prompts: P records.
            request: What the algorithm needs.
            generator: Source of the samples' seeds.
            clock: Gets the times at which sampling and decoding end.
            label: Prefix of the names of images that are saved because of an unusable score.

        Returns:
            The trajectory, and the scores at the chunks' boundaries (where :attr:`by_chunk`) and
            of the finished images, in order.

        Raises:
            RewardError: If a reward gives no usable score.
        """
        keep = request.keep_velocities or self.by_chunk
        sampler = replace(self.sampler, window=request.window, keep_velocities=keep)
        repeated = [prompt for prompt in prompts for _ in range(self.group_size)]
        with ScoringQueue(self.scorer, self.overlap) as queue:
            pending = queue.batch(repeated, self.group_size, label)

            def finished(rows: slice, latents: Tensor) -> None:
                clock.lap("rollout")
                pending.add(self.policy.decode(latents))
                clock.lap("decode")

            trajectory = sampler.rollout(
                self.policy, prompts, self.group_size, generator=generator, finished=finished
            )
            clock.lap("rollout")
            begun = []
            if self.by_chunk:
                begun = self.boundaries(queue, trajectory, request.chunk_starts, repeated, label)
            final = pending.result()
            scores = [*(each.result() for each in begun), final]
        return trajectory, scores

    def boundaries(
        self,
        queue: ScoringQueue,
        trajectory: Trajectory,
        starts: Sequence[int],
        prompts: Sequence[Prompt],
        label: str,
    ) -> list[PendingScores]:
        """Start scoring the clean prediction where each chunk begins."""
        begun, every = [], slice(None)
        for start in starts:
            clean = predict_clean(
                trajectory.state(every, start),
                trajectory.velocity(every, start),
                trajectory.trained_sigmas[start],
            )
            pending = queue.batch(prompts, self.group_size, f"{label}step-{start}-", watched=False)
            for part in clean.split(self.sampler.batch_size):
                pending.add(self.policy.decode(part))
            begun.append(pending)
        return begun
