# SPDX-License-Identifier: Apache-2.0
"""From prompts to trajectories: policy and transition, step by step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from chunkgrpo.core.schedules import validate_sigmas
from chunkgrpo.core.sde import Transition, predict_clean
from chunkgrpo.policies.protocol import Policy
from chunkgrpo.runtime.seeds import NoiseSource, derive_seed
from chunkgrpo.types import Conditioning, ProgressHook, Trajectory

# Axis names: B samples, M samples of one forward, N transitions.


@torch.no_grad()
def rollout(
    policy: Policy,
    prompts: Sequence[str],
    transition: Transition,
    sigmas: Tensor,
    group_size: int,
    generator: Generator | None = None,
    *,
    seeds: Sequence[int] | None = None,
    same_noise: bool = False,
    batch_size: int = 64,
    progress: ProgressHook | None = None,
) -> Trajectory:
    """Sample ``group_size`` images of each prompt and keep what training needs.

    Every step but the last draws from ``transition``; the last is deterministic, x0 = x - sigma v,
    and is not stored. Each sample owns its random streams, so ``batch_size`` and the order of
    prompts change nothing but rounding.

    Args:
        policy: The sampling policy.
        prompts: P prompts.
        transition: Shared with the algorithm, so that sampling and training can not disagree.
        sigmas: [K+1] decreasing to 0; K-1 transitions are trained.
        group_size: G >= 1 samples a prompt.
        generator: Source of the samples' seeds where ``seeds`` is None.
        seeds: One per sample, prompt-major.
        same_noise: Start the whole group from one noise; the first velocity, which the group then
            shares, is computed once a prompt.
        batch_size: Most samples in one forward.
        progress: Called after each forward with (done, total) network rows.

    Returns:
        The trajectory, prompt-major.

    Raises:
        ValueError: If the schedule, the group size or the seeds do not fit.
    """
    sigmas = validate_sigmas(sigmas).to(policy.device)
    num_prompts = len(prompts)
    num_samples = num_prompts * group_size
    if num_prompts < 1 or group_size < 1:
        raise ValueError(f"need at least one prompt and one image, got {num_prompts}, {group_size}")
    if seeds is None:
        base = int(torch.randint(2**62, (), generator=generator))
        seeds = [derive_seed(base, b) for b in range(num_samples)]
    if len(seeds) != num_samples:
        raise ValueError(f"{len(seeds)} seeds for {num_samples} samples; give one a sample")

    conditioning = policy.encode(prompts).repeat_interleave(group_size)
    if same_noise:
        first = NoiseSource([seeds[b - b % group_size] for b in range(num_samples)])
    else:
        first = NoiseSource([derive_seed(seed, 1) for seed in seeds])
    source = NoiseSource(list(seeds) if not same_noise else [derive_seed(s, 2) for s in seeds])
    num_steps = len(sigmas) - 1
    x_B = sigmas[0] * first.draw(policy.latent_shape, policy.device)
    states_BN = torch.empty(
        (num_samples, num_steps, *policy.latent_shape), dtype=torch.float32, device=policy.device
    )
    log_prob_BN = torch.zeros((num_samples, num_steps - 1), device=policy.device)
    num_evaluations = 0
    total = num_samples * (num_steps - 1) + (num_prompts if same_noise else num_samples)

    def velocity(x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        nonlocal num_evaluations
        parts = []
        for start in range(0, len(x), batch_size):
            rows = slice(start, start + batch_size)
            part = x[rows]
            parts.append(policy.velocity(part, sigma.expand(len(part)), conditioning[rows]))
            num_evaluations += len(part)
            if progress:
                progress(num_evaluations, total)
        return torch.cat(parts)

    for i in range(num_steps):
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        states_BN[:, i] = x_B
        if i == 0 and same_noise:
            one = slice(None, None, group_size)
            v_B = velocity(x_B[one], sigma, conditioning[one]).repeat_interleave(group_size, 0)
        else:
            v_B = velocity(x_B, sigma, conditioning)
        if i == num_steps - 1:
            x_B = predict_clean(x_B, v_B, sigma)
            break
        step = transition(x_B, v_B, sigma, sigma_next)
        if step.has_density:
            x_B = step.sample(noise=source.draw(policy.latent_shape, policy.device)).float()
            log_prob_BN[:, i] = step.log_prob_per_dim(x_B).float()
        else:
            x_B = step.mean.float()
    return Trajectory(
        states=states_BN,
        sigmas=sigmas,
        old_log_prob=log_prob_BN,
        final=x_B.float(),
        conditioning=conditioning,
        num_prompts=num_prompts,
        num_evaluations=num_evaluations,
    )
