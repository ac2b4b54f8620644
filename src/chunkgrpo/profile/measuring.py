# SPDX-License-Identifier: Apache-2.0
"""Measure how fast a policy's trajectories move, under one sampler or several.

Axes: P prompts x S seeds, crossed (seed s draws the same noise for every prompt); N trained steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chunkgrpo.core.sde import Kernel
from chunkgrpo.policies.protocol import Policy
from chunkgrpo.profile.proposals import Proposal, Window, propose
from chunkgrpo.profile.variance import Shares, crossed_interval, variance_shares
from chunkgrpo.rollout import Sampler, measured_speed
from chunkgrpo.runtime.seeds import derive_seed
from chunkgrpo.types import ProgressHook, Prompt


@dataclass(frozen=True, eq=False)
class Measurement:
    """The rollouts that measure a policy's speed.

    Attributes:
        prompts: P of them.
        sigmas: [K+1], the schedule; its N = K-1 trainable steps are measured.
        num_seeds: S; seed s is the same noise for every prompt.
        distance: A key of :data:`~chunkgrpo.core.dynamics.DISTANCES`.
        seed: Seed of the seeds.
        batch_size: Largest number of samples in one forward pass.
    """

    prompts: Sequence[Prompt | str]
    sigmas: Tensor
    num_seeds: int
    distance: str = "l1"
    seed: int = 0
    batch_size: int = 64


def measure_speed(
    policy: Policy,
    transition: Kernel,
    measurement: Measurement,
    *,
    window: range | None = None,
    prefix: str = "ode",
    progress: ProgressHook | None = None,
) -> NDArray:
    """Roll out every prompt with every seed and measure how fast the states move.

    Prompts are rolled out one after another, so that only one prompt's states are held.

    Args:
        policy: Any policy.
        transition: The sampler; its diffusion may be that of the ODE.
        measurement: What is rolled out.
        window, prefix: See :class:`~chunkgrpo.rollout.Sampler`.
        progress: Called after each prompt with (done, total) prompts.

    Returns:
        [P, S, N] float64 >= 0.
    """
    m = measurement
    seeds = [derive_seed(m.seed, s) for s in range(m.num_seeds)]
    sampler = Sampler(transition, m.sigmas, window, prefix, batch_size=m.batch_size)
    rows = []
    for index, prompt in enumerate(m.prompts):
        speed_SN = measured_speed(policy, [prompt], sampler, seeds, m.distance)
        rows.append(speed_SN.double().cpu())
        if progress:
            progress(index + 1, len(m.prompts))
    return torch.stack(rows).numpy()


@dataclass(frozen=True)
class SamplerProfile:
    """What was measured under one sampler.

    Attributes:
        name: The sampler, with its coefficient.
        speed: [P, S, N].
        mean, low, high: [N], mean speed and its 95 % interval over prompts and seeds.
        shares: Where its variance comes from.
        proposals: Where to cut it.
        inside: First step of a window to the mean speed inside it, [W], where proposals are for
            a window; else empty.
    """

    name: str
    speed: NDArray
    mean: NDArray
    low: NDArray
    high: NDArray
    shares: Shares
    proposals: tuple[Proposal, ...]
    inside: Mapping[int, NDArray] = field(default_factory=dict)

    @property
    def offset(self) -> int:
        """Step at which the proposals begin; of a window that moves, its first place."""
        return min(self.inside, default=0)

    def proposal(self, rule: str) -> Proposal:
        """Return the proposal of a rule.

        Raises:
            ValueError: If there is none for this schedule.
        """
        found = {proposal.rule: proposal for proposal in self.proposals}
        if rule not in found:
            raise ValueError(f"no chunks by the rule {rule!r} here; there are: {', '.join(found)}")
        return found[rule]


def profile_policy(
    policy: Policy,
    samplers: Mapping[str, Kernel],
    measurement: Measurement,
    *,
    min_size: int = 4,
    window: Window | None = None,
    progress: ProgressHook | None = None,
) -> tuple[SamplerProfile, ...]:
    """Profile a policy under several samplers, with the same prompts and initial noise.

    Args:
        policy: Any policy.
        samplers: Name of each sampler to its transition.
        measurement: What is rolled out; at least 2 prompts and 2 seeds.
        min_size: See :func:`~.proposals.propose`.
        window: What plans are proposed for; all steps where None. The first sampler is then
            measured once more, at each place, with noise in the window alone: long noisy steps
            do not keep the flow's marginals exactly, so states move faster after ODE steps.
            For the others, the window's part of the whole curve is cut.
        progress: Called with (done, total) prompts over all samplers.

    Returns:
        A profile per sampler, in order.

    Raises:
        ValueError: If there are fewer than two prompts or seeds, or a speed is 0.
    """
    num_prompts, num_seeds = len(measurement.prompts), measurement.num_seeds
    if num_prompts < 2 or num_seeds < 2:
        raise ValueError(
            f"{num_prompts} prompts and {num_seeds} seeds; telling the prompt from the noise "
            "needs at least 2 of each"
        )
    passes = len(samplers) + (len(window.places) if window else 0)
    finished = 0

    def hook(done: int, of: int) -> None:
        nonlocal finished
        finished += 1
        if progress:
            progress(finished, num_prompts * passes)

    profiles = []
    for index, (name, transition) in enumerate(samplers.items()):
        speed = measure_speed(policy, transition, measurement, progress=hook)
        mean, low, high = crossed_interval(speed)
        inside: dict[int, NDArray] = {}
        if window:
            for start in sorted(window.places):
                steps = range(start, start + window.size)
                inside[start] = mean[start : steps.stop]
                if index == 0:
                    again = measure_speed(
                        policy, transition, measurement,
                        window=steps, prefix=window.prefix, progress=hook,
                    )  # fmt: skip
                    inside[start] = again.mean((0, 1))
            shares = [window.places[start] for start in inside]
            proposals = propose(np.stack(list(inside.values())), min_size, shares)
        else:
            proposals = propose(mean, min_size)
        profiles.append(
            SamplerProfile(name, speed, mean, low, high, variance_shares(speed), proposals, inside)
        )
    return tuple(profiles)
