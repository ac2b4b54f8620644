# SPDX-License-Identifier: Apache-2.0
"""The step-level recipes against their papers' formulas, transcribed by hand.

Nothing of the library's arithmetic is used on the right-hand side: transitions, log-probabilities,
ratios, weights and penalties are written out anew, in one graph, in float64. So a wrong setting in
a recipe, a wrong formula in ``core`` and a wrong piece of the memory-bounded gradient all show.

Notation of the papers: dt = sigma_next - sigma < 0, nu the standard deviation of a step.
"""

import math

import pytest
import torch

from chunkgrpo.config import load_config
from chunkgrpo.config.build import build_algorithm, build_sampler, build_sigmas
from chunkgrpo.core import StepPlan, group_advantages
from chunkgrpo.types import Experience
from compose import rollout
from oracles import PROMPTS, close, collect, seeded, shift, toy


def flow_step(x, v, sigma, after, eta, first):
    dt, reference = after - sigma, after if first else sigma
    g = eta * math.sqrt(sigma / (1 - reference))
    mean = x * (1 + g**2 * dt / (2 * sigma)) + v * (1 + g**2 * (1 - sigma) / (2 * sigma)) * dt
    return mean, g * math.sqrt(-dt)


def dance_step(x, v, sigma, after, eta, first):
    dt, clean = after - sigma, x - sigma * v
    score = -(x - (1 - sigma) * clean) / sigma**2
    return x + dt * v - 0.5 * eta**2 * score * dt, eta * math.sqrt(-dt)


def cps_step(x, v, sigma, after, eta, first):
    nu = after * math.sin(eta * math.pi / 2)
    clean, noise = x - sigma * v, x + (1 - sigma) * v
    return (1 - after) * clean + math.sqrt(after**2 - nu**2) * noise, nu


def ppo(ratio, advantage, clip):
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))


# name -> (step, eta, clip, further settings)
METHODS = {
    "dance-grpo": (dance_step, 0.3, 1e-3, []),
    "flow-grpo": (flow_step, 0.7, 1e-3, []),
    "grpo-guard": (flow_step, 0.7, 2e-4, ["objective.trust.low=2e-4", "objective.trust.high=2e-4"]),
    "flow-cps": (cps_step, 0.9, 1e-3, []),
    "flow-dppo": (flow_step, 0.7, None, []),
    "tempflow-grpo-weights": (flow_step, 0.7, 1e-3, []),
}


def by_hand(name, policy, experience, samples, sigmas):
    """The loss of some samples as the paper says, with its gradient."""
    step, eta, clip, _ = METHODS[name]
    t, A = experience.trajectory, experience.advantages[samples].double()
    levels, losses, stds, kls = sigmas.double().tolist(), [], [], []
    for i in range(t.num_trained):
        x, result = t.states[samples, i].double(), t.states[samples, i + 1].double()
        at, sigma, after = t.conditioning_of(samples), levels[i], levels[i + 1]
        level = torch.full((len(x),), sigma, dtype=torch.float64)
        mean, nu = step(x, policy.velocity(x, level, at), sigma, after, eta, i == 0)
        before, _ = step(x, t.velocities[samples, i].double(), sigma, after, eta, i == 0)
        with torch.no_grad(), policy.reference():
            anchor, _ = step(x, policy.velocity(x, level, at), sigma, after, eta, i == 0)
        scale = 1.0 if name == "flow-cps" else 2 * nu**2
        new, old = (-(result - m).square().mean(1) / scale for m in (mean, before))
        bias = (mean - before).square().mean(1) / (2 * nu**2)
        g = nu / math.sqrt(sigma - after)
        kls.append((mean - anchor).square().mean(1) / (2 * g**2))
        stds.append(nu)
        if name == "grpo-guard":
            losses.append(ppo(((new - old + bias) * nu).exp(), A, clip) / (sigma - after))
        elif name == "flow-dppo":
            kept = ~((bias >= 1e-5) & (A * (new - old) > 0))
            losses.append(-A * (new - old).exp() * kept)
        else:
            losses.append(ppo((new - old).exp(), A, clip))
    loss_BN = torch.stack(losses, 1)
    if name == "tempflow-grpo-weights":
        loss_BN = loss_BN * torch.tensor(stds) / (sum(stds) / len(stds))
    value = loss_BN.mean()
    if name == "flow-grpo":
        value = value + 0.04 * torch.stack(kls, 1).mean()
    (gradient,) = torch.autograd.grad(value, policy.parameters())
    return value.detach(), gradient


@pytest.mark.parametrize("name", METHODS)
def test_recipe_is_its_papers_formula(name):
    settings = ["sampling.steps=8", "objective.selection.fraction=1", *METHODS[name][3]]
    config = load_config(name, settings)
    assert config.sampling.transition.eta == METHODS[name][1]
    assert config.objective.plan == StepPlan()
    policy = toy()
    sigmas = build_sigmas(config, policy)
    sampler = build_sampler(config, sigmas)

    def measured(distance):
        raise AssertionError("a plan of steps needs no measurement")

    algorithm = build_algorithm(config, policy, sampler, measured)
    shift(0.02)(policy)  # away from the reference
    trajectory = rollout(
        policy, PROMPTS, sampler.transition, sigmas, 8, seeded(1), keep_velocities=True,
        same_noise=config.sampling.same_noise,
    )  # fmt: skip
    rewards = torch.randn(24, generator=seeded(2))
    credit = group_advantages(rewards, 3, config.credit.convention).values
    experience = Experience(trajectory, credit)
    kept = policy.mean.detach().clone()
    updates = collect(algorithm, policy, experience, move=shift(0.03))
    assert len(updates) == config.objective.updates == 2
    with torch.no_grad():
        policy.mean.copy_(kept)
    cut = []
    for value, gradient, parts in updates:
        found = [p.diagnostics["sample"] for p in parts if "sample" in p.diagnostics]
        samples = torch.cat(found).unique()
        assert len(samples) == 12
        expected, expected_gradient = by_hand(name, policy, experience, samples, sigmas)
        close(value, expected, 1e-4)
        close(gradient, expected_gradient, 1e-3)
        cut += [p.diagnostics["cut"].float().mean() for p in parts if "cut" in p.diagnostics]
        shift(0.03)(policy)
    # Nothing is cut before the policy moves; then some is and some is not.
    assert cut[0] == 0 and 0 < cut[1] < 1
