# SPDX-License-Identifier: Apache-2.0
"""What the tests of the algorithms share: a toy policy, experience, and the direct loss.

Axes: B samples, N trained steps, C chunks.
"""

import torch
from torch import Generator

from chunkgrpo.core import (
    ChunkPlan,
    FlowDiffusion,
    Transition,
    chunk_log_ratio,
    clipped_surrogate,
    group_advantages,
    make_sigmas,
)
from chunkgrpo.policies.toy import GaussianPolicy
from chunkgrpo.types import Experience
from compose import rollout

PLAN = ChunkPlan((1, 2, 4))
SIGMAS = make_sigmas(8)
FLOW = Transition(FlowDiffusion(0.7))
PROMPTS = ["a", "b", "c"]


def seeded(seed=0):
    return Generator().manual_seed(seed)


def toy(dim=12, seed=5):
    return GaussianPolicy(torch.randn(dim, generator=seeded(seed), dtype=torch.float64), 0.5)


def make_experience(policy, prompts=PROMPTS, group_size=8, transition=FLOW, sigmas=SIGMAS):
    trajectory = rollout(policy, prompts, transition, sigmas, group_size, seeded(1))
    rewards = torch.randn(trajectory.num_samples, generator=seeded(2))
    advantages = group_advantages(rewards, len(prompts)).values
    return Experience(trajectory, advantages)


def collect(algorithm, policy, experience, move=None, seed=3):
    """Sum each update's values and gradients; ``move`` the policy after each update."""
    updates, value, parts = [], 0.0, []
    for parameter in policy.parameters():
        parameter.grad = None
    for part in algorithm.losses(policy, experience, seeded(seed)):
        part.backward()
        value += part.loss.detach().double()
        parts.append(part)
        if part.ends_update:
            grads = [p.grad.detach().clone().double().flatten() for p in policy.parameters()]
            updates.append((value, torch.cat(grads), parts))
            value, parts = 0.0, []
            for parameter in policy.parameters():
                parameter.grad = None
            if move:
                move(policy)
    return updates


def shift(amount, seed=50):
    def move(policy):
        with torch.no_grad():
            for i, parameter in enumerate(policy.parameters()):
                noise = torch.randn(
                    parameter.shape, generator=seeded(seed + i), dtype=torch.float64
                )
                parameter.add_(amount * noise.to(parameter.dtype))

    return move


def log_probs(policy, trajectory, samples, transition=FLOW):
    """[S, N] with gradient, step by step, as the rollout visited them."""
    columns = []
    for i in range(trajectory.num_trained):
        x, sigma = trajectory.states[samples, i], trajectory.sigmas[i]
        v = policy.velocity(x, sigma.expand(len(x)), trajectory.conditioning_of(samples))
        step = transition(x, v, sigma, trajectory.sigmas[i + 1])
        columns.append(step.log_prob_per_dim(trajectory.states[samples, i + 1]))
    return torch.stack(columns, 1)


def samples_of(parts):
    return torch.cat([part.diagnostics["sample"] for part in parts]).unique()


def chosen_of(parts, plan, num_samples):
    """[B, C]: the chunks that an update trained."""
    mask = torch.zeros(num_samples, plan.num_chunks, dtype=torch.bool)
    for part in parts:
        chunk = plan.chunk_of_step[part.diagnostics["step"]]
        mask[part.diagnostics["sample"], chunk] = True
    return mask


def direct(policy, experience, plan, samples, mask, clip):
    """The loss as the paper writes it, and its gradient."""
    new = log_probs(policy, experience.trajectory, samples)
    log_ratio = chunk_log_ratio(new, experience.trajectory.old_log_prob[samples], plan)
    loss = clipped_surrogate(log_ratio, experience.advantages[samples], clip, clip)
    value = loss[mask[samples]].mean()
    grads = torch.autograd.grad(value, policy.parameters())
    return value.detach(), torch.cat([g.double().flatten() for g in grads]), log_ratio.detach()


def close(actual, expected, tolerance):
    assert expected.norm() > 0
    assert (actual - expected).norm() <= tolerance * expected.norm()
