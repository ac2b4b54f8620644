# SPDX-License-Identifier: Apache-2.0
"""(sample, time) pairs on the forward process: a rollout's clean latents, noised again.

DiffusionNFT and AWM use only the clean latents and the advantages of a rollout, so any solver may
have sampled them.

Axis names: B samples, T times per sample, Q (sample, time) pairs of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor

from chunkgrpo.algorithms.pairs import Pairs, deal
from chunkgrpo.core.forward_process import noisy
from chunkgrpo.core.precision import at_least_float32
from chunkgrpo.core.times import AnyTimes, ChunkTimes
from chunkgrpo.policies.protocol import Policy
from chunkgrpo.runtime.seeds import NoiseSource
from chunkgrpo.runtime.transfer import send
from chunkgrpo.types import Conditioning, Experience, Trajectory


class ForwardLoss(Protocol):
    """The settings that objectives on the forward process have in common.

    Attributes:
        times: Which times of the schedule each sample is trained at.
        shared_noise: Whether the samples of a prompt have the same times and noises.
        updates: Optimizer steps per rollout.
        micro_batch: (sample, time) pairs per forward and backward.
    """

    @property
    def times(self) -> AnyTimes: ...
    @property
    def shared_noise(self) -> bool: ...
    @property
    def updates(self) -> int: ...
    @property
    def micro_batch(self) -> int: ...


@dataclass(frozen=True)
class NoisedPairs:
    """Some (sample, time) pairs with their noised latents.

    Attributes:
        sample, step: [Q]: rows of the trajectory, indices into its schedule.
        slot: [Q], column of [B, T].
        clean, noise, noised: [Q, *latent].
        sigma: [Q].
        conditioning: Q rows.
    """

    sample: Tensor
    step: Tensor
    slot: Tensor
    clean: Tensor
    noise: Tensor
    noised: Tensor
    sigma: Tensor
    conditioning: Conditioning

    def velocity(self, policy: Policy) -> Tensor:
        """Return the policy's velocity at the noised latents, with gradient where it is on."""
        return at_least_float32(policy.velocity(self.noised, self.sigma, self.conditioning))

    @torch.no_grad()
    def velocity_within(self, policy: Policy, context: AbstractContextManager[None]) -> Tensor:
        """Return the policy's velocity inside ``context``, without gradient."""
        with context:
            return self.velocity(policy)


@dataclass(frozen=True)
class Deal:
    """All random choices of one rollout's training, drawn before it starts.

    Noise is represented by one seed per pair: it takes no memory, is the same in a second pass, and
    does not depend on the micro-batches.

    Attributes:
        times: [B, T], indices into the schedule.
        seeds: [B, T], of each pair's noise.
        updates: For each optimizer step its micro-batches: rows and columns of [B, T].
    """

    times: Tensor
    seeds: Tensor
    updates: list[list[Pairs]]

    @staticmethod
    def draw(loss: ForwardLoss, experience: Experience, generator: Generator) -> Deal:
        """Draw times and noises, deal samples to updates, and an update's pairs to micro-batches.

        Args:
            loss: How many times, updates and pairs, and whether groups share times and noises.
            experience: The rollout.
            generator: On the CPU.

        Raises:
            ValueError: If there are fewer samples than updates, or fewer groups where these share.
        """
        trajectory, micro_batch = experience.trajectory, loss.micro_batch
        each = trajectory.group_size if loss.shared_noise else 1
        num_drawn = trajectory.num_samples // each
        num_steps = len(trajectory.sigmas) - 1
        times_BT = loss.times.draw(num_steps, num_drawn, generator).repeat_interleave(each, 0)
        num_times = times_BT.shape[1]
        seeds = torch.randint(2**62, (num_drawn, num_times), generator=generator)
        seeds_BT = seeds.repeat_interleave(each, 0)
        updates = []
        for share in deal(experience, loss.updates, generator, whole=loss.shared_noise):
            sample = share.repeat_interleave(num_times)
            slot = torch.arange(num_times).repeat(len(share))
            # Shuffled, so that every micro-batch holds all noise levels.
            order = torch.randperm(len(sample), generator=generator)
            parts = order.tensor_split(-(-len(order) // micro_batch))
            updates.append([(sample[part], slot[part]) for part in parts])
        return Deal(times_BT, seeds_BT, updates)

    def pairs(self, trajectory: Trajectory, slots: Pairs) -> NoisedPairs:
        """Noise the clean latents of some pairs."""
        # Sent in one piece, so that the host does not wait: indexing from the host would.
        where = send(torch.stack([*slots, self.times[slots]]), trajectory.device)
        sample, slot, step = where.unbind()
        clean = trajectory.final[sample]
        source = NoiseSource(self.seeds[slots].tolist())
        noise = source.draw(tuple(clean.shape[1:]), clean.device)
        sigma = trajectory.sigmas[step]
        noised = noisy(clean, noise, sigma)
        conditioning = trajectory.conditioning_of(sample)
        return NoisedPairs(sample, step, slot, clean, noise, noised, sigma, conditioning)


def num_pairs(batches: Sequence[Pairs]) -> int:
    """Count the pairs of some micro-batches."""
    return sum(len(sample) for sample, _ in batches)


def check_not_negative(name: str, value: float) -> None:
    """Refuse a negative weight.

    Raises:
        ValueError: With its name.
    """
    if not value >= 0:
        raise ValueError(f"{name} is {value}; a penalty must not be negative; 0 turns it off")


def check_positive(name: str, value: float) -> None:
    """Refuse a number that is not above 0.

    Raises:
        ValueError: With its name.
    """
    if not value > 0:
        raise ValueError(f"{name} is {value}; it must be positive")


def advantages_by_slot(experience: Experience, times: AnyTimes, num_times: int) -> Tensor:
    """Return the advantage of each (sample, time) pair, [B, T].

    Args:
        experience: Advantages [B], or [B, C] with one per chunk of ``times``.
        times: What drew the times.
        num_times: T.

    Raises:
        ValueError: If there are advantages by chunk and the times are not drawn by these chunks.
    """
    advantages, num_samples = experience.advantages, experience.trajectory.num_samples
    if advantages.shape == (num_samples,):
        return advantages[:, None].expand(-1, num_times)
    chunks = len(times.sizes) if isinstance(times, ChunkTimes) else None
    if not isinstance(times, ChunkTimes) or advantages.shape != (num_samples, chunks):
        raise ValueError(
            f"advantages have shape {tuple(advantages.shape)}; a method that trains on clean "
            f"latents has one per sample, ({num_samples},), or per sample and chunk of its times, "
            f"({num_samples}, {chunks}), which times of kind 'chunks' have"
        )
    return advantages[:, times.chunk_of_slot.to(advantages.device)]
