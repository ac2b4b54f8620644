# SPDX-License-Identifier: Apache-2.0
"""What the tests of the algorithms share: a toy policy, experience, and the direct loss.

Axes: B samples, N trained steps, C chunks.
"""

import itertools

import torch
from torch import Generator

from chunkgrpo.core import (
    ChunkPlan,
    Clip,
    FlowDiffusion,
    KlMask,
    RateKl,
    Transition,
    chunk_log_ratio,
    clipped_surrogate,
    group_advantages,
    make_sigmas,
    policy_gradient_scale,
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


def experience_with_velocities(policy, transition=FLOW, window=None):
    """What objectives train on that compare with the sampling policy's predictions."""
    trajectory = rollout(
        policy, PROMPTS, transition, SIGMAS, 8, seeded(1), keep_velocities=True, window=window
    )
    rewards = torch.randn(trajectory.num_samples, generator=seeded(2))
    return Experience(trajectory, group_advantages(rewards, len(PROMPTS)).values)


def objective(policy, experience, algorithm, samples, mask):
    """A whole objective as its formula says, all in one graph; returns value and gradient."""
    t, a, o = experience.trajectory, algorithm, algorithm.loss
    sigmas = t.sigmas[t.offset :]
    logs, bias, kls, clean = [], [], [], []
    for i in range(t.num_trained):
        x, s, n = t.states[samples, i], sigmas[i], sigmas[i + 1]
        v = policy.velocity(x, s.expand(len(x)), t.conditioning_of(samples))
        new = a.transition(x, v, s, n)
        old_v = t.velocities[samples, i].to(v.dtype)
        old = a.transition(x, old_v, s, n)
        logs.append(new.log_prob_per_dim(t.states[samples, i + 1]))
        bias.append(((new.mean - old.mean) ** 2 / (2 * old.std**2)).mean(1))
        clean.append(-s * (v - old_v))
        with torch.no_grad(), policy.reference():
            v_ref = policy.velocity(x, s.expand(len(x)), t.conditioning_of(samples))
        ref = a.transition(x, v_ref, s, n)
        kl = ((new.mean - ref.mean) ** 2 / (2 * ref.std**2)).mean(1)
        kls.append(kl * (s - n) if isinstance(o.kl, RateKl) else kl)
    new_BN, bias_BN, kl_BN = torch.stack(logs, 1), torch.stack(bias, 1), torch.stack(kls, 1)
    step = new_BN - t.old_log_prob[samples]
    std = a.transition.std(sigmas[: t.num_trained], sigmas[1 : t.num_trained + 1])
    dt = sigmas[: t.num_trained] - sigmas[1 : t.num_trained + 1]
    if o.ratio == "guard":
        step = (step + bias_BN) * std
    elif o.ratio == "full":
        step = step * t.final[0].numel()
    elif o.ratio == "squared_error":
        step = step * 2 * std**2
    if o.inner_weights == "equal_kappa":
        kappa = policy_gradient_scale(t.sigmas, a.transition.diffusion)
        kappa = kappa[t.offset : t.offset + t.num_trained]
        step = step * (1 / kappa) / (1 / kappa).mean()
    sizes = [size for size in a.plan.sizes for _ in range(size)]
    outer = {
        "none": torch.ones_like(dt),
        "noise_level": std / std.mean(),
        "inverse_dt": 1 / dt,
        "chunk_size": torch.tensor(sizes) * a.plan.num_chunks / a.plan.num_steps,
    }
    losses = []
    weights = a.selection.loss_weights(a.plan, t.dynamics, None)[samples]
    A = experience.advantages[samples]
    for c in range(a.plan.num_chunks):
        inside = list(a.plan.steps_of(c))
        log_s = step[:, inside].mean(1)
        s = log_s.exp()
        region = o.trust
        if isinstance(region, Clip):
            loss = torch.maximum(-A * s, -A * s.clamp(1 - region.low, 1 + region.high))
        elif isinstance(region, KlMask):
            gone = (bias_BN[:, inside].mean(1) >= region.threshold) & (A * log_s > 0)
            loss = -A * s * (~gone).detach()
        else:
            loss = -A * s
        k3 = (-log_s).exp() - 1 + log_s
        loss = (loss + o.old_kl * k3) * outer[o.outer_weights.kind][inside].mean()
        losses.append(loss * weights[:, c])
    value = torch.stack(losses, 1)[mask[samples]].mean()
    if o.kl.weight:
        trained = mask[samples][:, a.plan.chunk_of_step]
        value = value + o.kl.weight * kl_BN[trained].mean()
    if o.consistency:
        starts = a.plan.starts
        terms = [((clean[k] - clean[i]) ** 2).mean() for i, k in itertools.pairwise(starts)]
        value = value + o.consistency * torch.stack(terms).mean()
    grads = torch.autograd.grad(value, policy.parameters())
    return value.detach(), torch.cat([g.double().flatten() for g in grads])


def close(actual, expected, tolerance):
    assert expected.norm() > 0
    assert (actual - expected).norm() <= tolerance * expected.norm()
