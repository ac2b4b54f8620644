# SPDX-License-Identifier: Apache-2.0
"""From prompts to trajectories: policy and transition, step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from chunkgrpo.core.dynamics import DISTANCES
from chunkgrpo.core.schedules import validate_sigmas
from chunkgrpo.core.sde import Kernel, OdeDiffusion, Transition, predict_clean
from chunkgrpo.policies.protocol import Policy
from chunkgrpo.runtime.seeds import NoiseSource, derive_seed
from chunkgrpo.types import Conditioning, ProgressHook, Prompt, Trajectory

# Axis names: P prompts, B samples, R rows that still differ, M samples of one batch, N transitions.

PREFIXES = ("ode", "sde")

Tail = Callable[[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor], Tensor]
"""Finishes a trajectory without noise: (velocity(x, sigma), x, sigmas that are left) -> x0."""

STORE_PLACES = ("device", "host")
STORE_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Store:
    """How a trajectory's states are kept until they are trained on.

    Where states are kept in bfloat16, the sampler itself goes on from the rounded state, and its
    density is that of the rounded state. So what is stored is what was sampled: ratios before an
    update are as exact as in float32. The price is that the noise is rounded: its spread is the
    transition's only up to one part in 256 of the latent's size, and samples are others.

    Attributes:
        place: ``"device"``, or ``"host"``: host memory, with the same numbers.
        dtype: Float32, or bfloat16 for half the memory.

    Raises:
        ValueError: If either is unknown.
    """

    place: str = "device"
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.place not in STORE_PLACES or self.dtype not in STORE_DTYPES:
            raise ValueError(
                f"trajectories can not be stored in {self.dtype} on {self.place!r}; known: "
                f"{', '.join(STORE_PLACES)}, float32 and bfloat16"
            )

    def empty(self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return room for tensors that come from a device."""
        if self.place == "device":
            return torch.empty(shape, device=device, dtype=dtype)
        return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")

    def kept(self, x: Tensor) -> Tensor:
        """Return a state as it will come back: rounded to the type of the store."""
        return x if self.dtype == torch.float32 else x.to(self.dtype).float()


FinishedHook = Callable[[slice, Tensor], None]
"""Called with samples that are finished and their clean latents [M, *latent]."""


@torch.no_grad()
def rollout(
    policy: Policy,
    prompts: Sequence[Prompt | str],
    transition: Kernel,
    sigmas: Tensor,
    group_size: int,
    generator: Generator | None = None,
    *,
    seeds: Sequence[int] | None = None,
    same_noise: bool = False,
    batch_size: int = 64,
    window: range | None = None,
    prefix: str = "ode",
    tail: Tail | None = None,
    keep_velocities: bool = False,
    progress: ProgressHook | None = None,
    finished: FinishedHook | None = None,
    store: Store | None = None,
) -> Trajectory:
    """Sample ``group_size`` images of each prompt and keep what training needs.

    Kept are the states of the window, which the algorithm can choose trained steps from, and no
    others.

    Every step of the window but the last of the schedule draws from ``transition``; the last is
    deterministic, x0 = x - sigma v, and is not stored. Each sample owns its random streams, so
    ``batch_size`` and the order of prompts change nothing but rounding.

    Where a group starts from one noise and all steps before the window are shared too, its members
    are one row until the window begins: the window's first state is a branching point, and the
    prefix costs a network row per prompt, not per sample. After it, ``batch_size`` samples at a
    time are taken to the end, so that those which are finished can be decoded and scored while
    the others are still on their way.

    Args:
        policy: The sampling policy.
        prompts: P prompts.
        transition: Shared with the algorithm, so that sampling and training can not disagree.
        sigmas: [K+1] decreasing to 0; K-1 transitions can be trained.
        group_size: G >= 1 samples a prompt.
        generator: Source of the samples' seeds where ``seeds`` is None.
        seeds: One per sample, prompt-major.
        same_noise: Start the whole group from one noise.
        batch_size: Most samples in one forward.
        window: Sampler steps that are stochastic, stored and trained, within 0..K-2; all of them
            where None. Outside it, steps follow the ODE.
        prefix: ``"ode"``, or ``"sde"``: steps before the window draw noise too, and where the group
            shares its first noise it shares this noise as well.
        tail: Solver of the steps after the window; Euler where None.
        keep_velocities: Store the sampling policy's velocities.
        progress: Called after each forward with (done, expected) network rows.
        finished: Called with each batch of samples as it is finished, in order.
        store: Where and in which type states are kept; float32 on the device where None.

    Returns:
        The trajectory, prompt-major.

    Raises:
        ValueError: If the schedule, the window, the group size or the seeds do not fit.
    """
    sigmas = validate_sigmas(sigmas).to(policy.device)
    num_prompts = len(prompts)
    num_samples = num_prompts * group_size
    num_steps = len(sigmas) - 1
    if num_prompts < 1 or group_size < 1:
        raise ValueError(f"need at least one prompt and one image, got {num_prompts}, {group_size}")
    window = range(num_steps - 1) if window is None else window
    if not (0 <= window.start < window.stop < num_steps and window.step == 1):
        raise ValueError(
            f"the window of stochastic steps is {window}, but a schedule of {num_steps} steps has "
            f"the trained steps 0 to {num_steps - 2}; move or shorten it"
        )
    if prefix not in PREFIXES:
        raise ValueError(f"the prefix is {prefix!r}; it must be one of {', '.join(PREFIXES)}")
    if seeds is None:
        base = int(torch.randint(2**62, (), generator=generator))
        seeds = [derive_seed(base, b) for b in range(num_samples)]
    if len(seeds) != num_samples:
        raise ValueError(f"{len(seeds)} seeds for {num_samples} samples; give one a sample")

    conditioning = policy.encode(prompts)
    prompt_of_B = torch.arange(num_samples, device=policy.device) // group_size
    # Members of a group are one row until noise of their own tells them apart.
    fold = group_size if same_noise else 1
    ode = Transition(OdeDiffusion())
    latent, device = policy.latent_shape, policy.device
    num_trained = len(window)
    store = store or Store()
    shape = (num_samples, num_trained + 1, *latent)
    states_BN = store.empty(shape, device, store.dtype)
    velocities_BN = None
    if keep_velocities:
        # In float32 always: a rounded one would look like a policy that has moved.
        shape = (num_samples, num_trained, *latent)
        velocities_BN = store.empty(shape, device, torch.float32)
    log_prob_BN = torch.zeros((num_samples, num_trained), device=device)
    final_B = torch.empty((num_samples, *latent), device=device)
    num_evaluations = 0
    shared_steps = window.start + 1
    total = num_samples // fold * shared_steps + num_samples * (num_steps - shared_steps)

    def velocity(x: Tensor, sigma: Tensor, rows_of: Conditioning) -> Tensor:
        nonlocal num_evaluations
        parts = []
        for start in range(0, len(x), batch_size):
            part = x[start : start + batch_size]
            parts.append(
                policy.velocity(part, sigma.expand(len(part)), rows_of[start : start + batch_size])
            )
            num_evaluations += len(part)
            if progress:
                progress(num_evaluations, total)
        return torch.cat(parts)

    def first(rows: Sequence[int]) -> Tensor:
        start = NoiseSource(rows if same_noise else [derive_seed(seed, 1) for seed in rows])
        return sigmas[0] * start.draw(latent, device)

    def to_window(x_R: Tensor, rows: Sequence[int], rows_of: Conditioning) -> Tensor:
        """Take the steps before the window."""
        before = NoiseSource([derive_seed(seed, 3) for seed in rows])
        for i in range(window.start):
            v_R = velocity(x_R, sigmas[i], rows_of)
            if prefix == "sde":
                step = transition(x_R, v_R, sigmas[i], sigmas[i + 1])
                x_R = step.sample(noise=before.draw(latent, device)).float()
            else:
                x_R = ode(x_R, v_R, sigmas[i], sigmas[i + 1]).mean.float()
        return store.kept(x_R)

    def to_end(x_M: Tensor, v_M: Tensor, rows: slice, rows_of: Conditioning) -> Tensor:
        """Take the steps from the window on; ``v_M`` is the velocity of its first."""
        own = seeds[rows]
        inside = NoiseSource([derive_seed(s, 2) for s in own] if same_noise else list(own))
        for i in range(window.start, num_steps):
            sigma, sigma_next = sigmas[i], sigmas[i + 1]
            if i == window.stop and tail is not None:
                states_BN[rows, num_trained] = x_M
                return tail(lambda x, level: velocity(x, level, rows_of), x_M, sigmas[i:])
            if i > window.start:
                v_M = velocity(x_M, sigma, rows_of)
            if i <= window.stop:
                states_BN[rows, i - window.start] = x_M
            if i in window and velocities_BN is not None:
                velocities_BN[rows, i - window.start] = v_M
            if i == num_steps - 1:
                x_M = predict_clean(x_M, v_M, sigma)
            elif i in window:
                step = transition(x_M, v_M, sigma, sigma_next)
                if step.has_density:
                    x_M = store.kept(step.sample(noise=inside.draw(latent, device)).float())
                    log_prob_BN[rows, i - window.start] = step.log_prob_per_dim(x_M).float()
                else:
                    x_M = store.kept(step.mean.float())
            else:
                x_M = ode(x_M, v_M, sigma, sigma_next).mean.float()
        return x_M

    shared = None
    if fold > 1:
        x_P = to_window(first(seeds[::fold]), seeds[::fold], conditioning)
        v_P = velocity(x_P, sigmas[window.start], conditioning)
        shared = x_P.repeat_interleave(fold, 0), v_P.repeat_interleave(fold, 0)
    for begin in range(0, num_samples, batch_size):
        rows = slice(begin, min(begin + batch_size, num_samples))
        rows_of = conditioning[prompt_of_B[rows]]
        if shared is None:
            x_M = to_window(first(seeds[rows]), seeds[rows], rows_of)
            v_M = velocity(x_M, sigmas[window.start], rows_of)
        else:
            x_M, v_M = (each[rows] for each in shared)
        final_B[rows] = to_end(x_M, v_M, rows, rows_of).float()
        if finished:
            finished(rows, final_B[rows])
    return Trajectory(
        states=states_BN,
        sigmas=sigmas,
        old_log_prob=log_prob_BN,
        final=final_B,
        conditioning=conditioning,
        num_prompts=num_prompts,
        num_evaluations=num_evaluations,
        offset=window.start,
        shared_start=same_noise,
        velocities=velocities_BN,
    )


def measured_speed(
    policy: Policy,
    prompts: Sequence[Prompt | str],
    transition: Kernel,
    sigmas: Tensor,
    seeds: Sequence[int],
    *,
    distance: str = "l1",
    batch_size: int = 64,
    window: range | None = None,
    prefix: str = "ode",
) -> Tensor:
    """Roll trajectories out and measure how fast their states move.

    Args:
        policy: Any policy.
        prompts: P prompts.
        transition: The sampler; its diffusion may be that of the ODE.
        sigmas: [K+1], the schedule.
        seeds: One per trajectory, prompt-major; a multiple of P.
        distance: A key of :data:`~chunkgrpo.core.dynamics.DISTANCES`.
        batch_size: Most samples in one forward.
        window, prefix: As in :func:`rollout`; only the window's N steps are measured.

    Returns:
        [len(seeds), N] >= 0.
    """
    group_size = len(seeds) // len(prompts)
    trajectory = rollout(
        policy, prompts, transition, sigmas, group_size, seeds=seeds, batch_size=batch_size,
        window=window, prefix=prefix,
    )  # fmt: skip
    return DISTANCES[distance](trajectory.states)
