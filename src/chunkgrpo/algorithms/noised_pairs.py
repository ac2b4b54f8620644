# SPDX-License-Identifier: Apache-2.0
"""(sample, time) pairs on the forward process: a rollout's clean latents, noised again.

DiffusionNFT and AWM use only the clean latents and the advantages of a rollout, so any solver may
have sampled them.

Axis names: B samples, T times per sample, Q (sample, time) pairs of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from chunkgrpo.algorithms.pairs import Pairs, deal
from chunkgrpo.core.forward_process import noisy
from chunkgrpo.core.precision import at_least_float32
from chunkgrpo.policies.protocol import Policy
from chunkgrpo.runtime.seeds import NoiseSource
from chunkgrpo.runtime.transfer import send
from chunkgrpo.types import Conditioning, Experience, Trajectory


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
    def draw(
        times_BT: Tensor,
        experience: Experience,
        num_updates: int,
        micro_batch: int,
        generator: Generator,
    ) -> Deal:
        """Deal samples to updates at random, and each update's pairs to equal micro-batches."""
        num_times = times_BT.shape[1]
        seeds_BT = torch.randint(2**62, times_BT.shape, generator=generator)
        updates = []
        for share in deal(experience, num_updates, generator):
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


def check_method(info: Mapping[str, Any], method: str) -> None:
    """Refuse what another method saved: its second policy may have the same tensors.

    Raises:
        ValueError: With both names.
    """
    found = info.get("method", "none that trains finished images")
    if found != method:
        raise ValueError(
            f"the checkpoint was written by another method than {method}: {found}; start a new run"
        )


def check_sample_advantages(experience: Experience) -> None:
    """Refuse advantages by chunk, which a method without chunks cannot use.

    Raises:
        ValueError: With their shape.
    """
    shape, num_samples = tuple(experience.advantages.shape), experience.trajectory.num_samples
    if shape != (num_samples,):
        raise ValueError(
            f"advantages have shape {shape}; a method that trains on clean latents has one per "
            f"sample, ({num_samples},); credit by chunk needs Chunk-GRPO"
        )
