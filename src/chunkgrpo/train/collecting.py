# SPDX-License-Identifier: Apache-2.0
"""One rollout and its scores; images may be scored while later ones are still being sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from chunkgrpo.core.finite import finite_rows
from chunkgrpo.core.sde import predict_clean
from chunkgrpo.policies.protocol import Policy
from chunkgrpo.rewards.overlap import PendingScores, ScoringQueue
from chunkgrpo.rewards.scoring import Scorer
from chunkgrpo.rollout import Sampler
from chunkgrpo.runtime.finite import nonfinite
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
            NonFiniteError: If a latent, a log-density or an image is not finite, unless the scorer
                drops such samples.
        """
        keep = request.keep_velocities or self.by_chunk
        sampler = replace(self.sampler, window=request.window, keep_velocities=keep)
        repeated = [prompt for prompt in prompts for _ in range(self.group_size)]
        with ScoringQueue(self.scorer, self.overlap) as queue:
            pending = queue.batch(repeated, self.group_size, label)
            lost = False

            def finished(rows: slice, latents: Tensor) -> None:
                nonlocal lost
                clock.lap("rollout")
                good = finite_rows(latents)
                lost = lost or not (self.scorer.drops or bool(good.all()))
                if not lost:  # otherwise the whole rollout is refused as soon as it is complete
                    pending.add(masked(self.policy.decode(latents), good))
                clock.lap("decode")

            trajectory = sampler.rollout(
                self.policy, prompts, self.group_size, generator=generator, finished=finished
            )
            clock.lap("rollout")
            trajectory = without_lost(trajectory) if self.scorer.drops else checked(trajectory)
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


def masked(images: Tensor, good: Tensor) -> Tensor:
    """Return images, all NaN where the latent was not finite, whatever the decoder made of it."""
    return images.masked_fill(~good.to(images.device)[:, None, None, None], float("nan"))


def checked(trajectory: Trajectory) -> Trajectory:
    """Return a trajectory whose latents and log-densities are finite.

    A state that is not finite makes its transition's log-density so, and the final latent.

    Raises:
        NonFiniteError: Naming the sampler step at which it began, and the sample.
    """
    good_B = finite_rows(trajectory.old_log_prob, trajectory.final)
    if good_B.all():
        return trajectory
    bad_BN = ~trajectory.old_log_prob.isfinite()
    if bad_BN.any():
        row = int(bad_BN.any(dim=0).nonzero()[0])
        step, sample = trajectory.offset + row, int(bad_BN[:, row].nonzero()[0])
        raise nonfinite("rollout", f"the latent of step {step}, sample {sample}")
    sample = int((~good_B).nonzero()[0])
    raise nonfinite("rollout", f"the final latent of sample {sample}")


def without_lost(trajectory: Trajectory) -> Trajectory:
    """Return a trajectory whose samples that are not finite are marked as lost.

    Their rows are overwritten by those of the first good sample, so that no table by sample holds
    a number that is not finite.

    Raises:
        NonFiniteError: If no sample is good.
    """
    good_B = finite_rows(trajectory.old_log_prob, trajectory.final)
    if good_B.all():
        return trajectory
    if not good_B.any():
        return checked(trajectory)
    first = int(good_B.nonzero()[0])
    stored = (trajectory.states, trajectory.velocities)
    for values in (*stored, trajectory.old_log_prob, trajectory.final):
        if values is not None:
            values[(~good_B).to(values.device)] = values[first].clone()
    return replace(trajectory, lost=~good_B)


def trainable(trajectory: Trajectory, chosen: Tensor | None) -> Tensor | None:
    """Leave lost samples out of those that are trained on.

    Args:
        trajectory: B samples.
        chosen: Indices of the samples to be trained on, ascending; all where None.
    """
    if trajectory.lost is None:
        return chosen
    lost_B = trajectory.lost.cpu()
    among = torch.arange(len(lost_B)) if chosen is None else chosen.cpu()
    return among[~lost_B[among]]
