# SPDX-License-Identifier: Apache-2.0
"""Every option of Chunk-GRPO's objective against one graph, one loss and autograd.

Axes: B samples, N trained steps, C chunks.
"""

import itertools
from dataclasses import dataclass, replace

import pytest
import torch

from chunkgrpo.core import (
    ChunkPlan,
    ChunkSizeWeights,
    Clip,
    CpsTransition,
    DanceDiffusion,
    InverseDtWeights,
    KlMask,
    NoiseLevelWeights,
    NoOuterWeights,
    NoTrustRegion,
    RateKl,
    Transition,
    TransitionKl,
    UniformSelection,
    group_advantages,
    transition_scale,
)
from chunkgrpo.types import Experience
from closed_forms import policy_gradient_scale
from compose import chunk_grpo, rollout
from oracles import (
    FLOW,
    PLAN,
    PROMPTS,
    SIGMAS,
    chosen_of,
    close,
    collect,
    experience_with_velocities,
    objective,
    samples_of,
    seeded,
    shift,
    toy,
)


@dataclass(frozen=True)
class Doubling(UniformSelection):
    """Uniform choice whose second chunk counts double."""

    def loss_weights(self, plan, curve_BN, chosen_BM):
        weights = torch.ones(len(curve_BN), plan.num_chunks)
        weights[:, 1] = 2.0
        return weights


OPTIONS = {
    "published": {},
    "full": {"ratio": "full", "trust": Clip(0.05, 0.1)},
    "guard": {"ratio": "guard", "trust": Clip(1e-3, 1e-3)},
    "guard, weighted as published": {"ratio": "guard", "outer_weights": InverseDtWeights()},
    "squared error": {"ratio": "squared_error", "trust": Clip(1e-3, 1e-3)},
    "KL mask": {"trust": KlMask(1e-4)},
    "KL mask that drops nothing": {"trust": KlMask(10.0)},
    "no trust region": {"trust": NoTrustRegion()},
    "equal kappa": {"inner_weights": "equal_kappa", "trust": Clip(2e-3, 2e-3)},
    "noise level": {"outer_weights": NoiseLevelWeights()},
    "k3 to the sampling policy": {"old_kl": 3.0, "trust": NoTrustRegion()},
    "reference KL": {"kl": TransitionKl(0.5)},
    "reference KL as a rate": {"kl": RateKl(0.5)},
    "consistency": {"consistency": 50.0},
    "chunk size": {"outer_weights": ChunkSizeWeights()},
    "weighted selection": {"selection": Doubling(0.67)},
    "all at once": {
        "ratio": "guard",
        "inner_weights": "equal_kappa",
        "outer_weights": NoiseLevelWeights(),
        "trust": KlMask(1e-4),
        "old_kl": 2.0,
        "kl": TransitionKl(0.3),
        "consistency": 0.4,
        "selection": Doubling(0.67),
    },
}


NEVER_CUT = {"KL mask that drops nothing", "no trust region", "k3 to the sampling policy"}


@pytest.mark.parametrize("micro_batch", [7, 1000])
@pytest.mark.parametrize("name", OPTIONS)
def test_pieces_sum_to_the_loss_and_its_gradient(name, micro_batch):
    policy = toy()
    shift(0.02)(policy)  # away from the reference, so that its KL is not flat
    experience = experience_with_velocities(policy)
    options = {"selection": UniformSelection(0.67), "trust": Clip(1e-3, 1e-3)}
    algorithm = chunk_grpo(
        PLAN, FLOW, updates=3, micro_batch=micro_batch, **options | OPTIONS[name]
    )
    kept = policy.mean.detach().clone()
    updates = collect(algorithm, policy, experience, move=shift(0.05))
    with torch.no_grad():
        policy.mean.copy_(kept)
    # Advantages of both signs lose their gradient and keep it, or the comparison would show little.
    later = [parts[-1].diagnostics for _, _, parts in updates[1:]]
    positive = torch.cat([d["chunk_advantage"] > 0 for d in later])
    cut = torch.cat([d["cut"] for d in later])
    seen = set(zip(positive.tolist(), cut.tolist(), strict=True))
    kinds = (False,) if name in NEVER_CUT else (False, True)
    assert seen == set(itertools.product((False, True), kinds))
    for value, gradient, parts in updates:
        samples = torch.cat([p.diagnostics["sample"] for p in parts if "sample" in p.diagnostics])
        samples = samples.unique()
        mask = chosen_of([p for p in parts if "sample" in p.diagnostics], PLAN, 24)
        expected, expected_gradient = objective(policy, experience, algorithm, samples, mask)
        close(value, expected, 1e-5)
        close(gradient, expected_gradient, 1e-4)
        shift(0.05)(policy)


def test_options_change_the_gradient():
    """No option is read and then forgotten."""
    seen = {}
    for name, options in OPTIONS.items():
        policy = toy()
        shift(0.02)(policy)
        experience = experience_with_velocities(policy)
        base = {"selection": UniformSelection(0.67), "trust": Clip(1e-3, 1e-3)}
        algorithm = chunk_grpo(PLAN, FLOW, updates=2, **base | options)
        last = collect(algorithm, policy, experience, move=shift(0.05))[-1]
        seen[name] = last[1]
    same = {"KL mask that drops nothing", "no trust region"}
    names = list(seen)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            if {first, second} == same:
                torch.testing.assert_close(seen[first], seen[second])
            else:
                assert not torch.allclose(seen[first], seen[second], rtol=1e-3), (first, second)


def test_reference_kl_pulls_towards_the_reference():
    policy = toy()
    shift(0.3)(policy)
    experience = experience_with_velocities(policy)
    experience = Experience(experience.trajectory, torch.zeros_like(experience.advantages))
    algorithm = chunk_grpo(PLAN, FLOW, updates=1, kl=TransitionKl(1.0))
    ((_, gradient, _),) = collect(algorithm, policy, experience)
    away = (policy.mean - policy._base).detach()
    # Here every element's KL is quadratic in its own distance, with one positive factor for all.
    factor = gradient / away
    assert (factor > 0).all()
    torch.testing.assert_close(factor, factor.mean().expand_as(factor), rtol=1e-5, atol=0)


def test_consistency_is_flat_until_the_policy_moves():
    policy = toy()
    experience = experience_with_velocities(policy)
    algorithm = chunk_grpo(PLAN, FLOW, updates=2, consistency=5.0)
    plain = chunk_grpo(PLAN, FLOW, updates=2)
    with_term = collect(algorithm, policy, experience)
    without = collect(plain, policy, experience)
    for (_, a, _), (_, b, _) in zip(with_term, without, strict=True):
        torch.testing.assert_close(a, b)


def test_windows_train_their_own_steps():
    policy = toy()
    experience = experience_with_velocities(policy, window=range(2, 5))
    algorithm = chunk_grpo(ChunkPlan((1, 2)), FLOW, updates=2, selection=UniformSelection(1.0))
    updates = collect(algorithm, policy, experience, move=shift(0.05))
    fresh = toy()
    for value, gradient, parts in updates:
        mask = chosen_of(parts, algorithm.plan, 24)
        expected, expected_gradient = objective(
            fresh, experience, algorithm, samples_of(parts), mask
        )
        close(value, expected, 1e-5)
        close(gradient, expected_gradient, 1e-4)
        shift(0.05)(fresh)


@pytest.mark.parametrize("kernel", [FLOW, Transition(DanceDiffusion(0.3))])
def test_scale_read_off_the_kernel_is_the_closed_form(kernel):
    sigmas = SIGMAS[:-1].double()
    torch.testing.assert_close(
        transition_scale(kernel, sigmas), policy_gradient_scale(sigmas, kernel.diffusion)
    )


def test_cps_ratio_is_the_difference_of_squared_errors():
    """What Flow-CPS publishes, from a density whose variance cancels."""
    policy, kernel = toy(), CpsTransition(0.8)
    experience = experience_with_velocities(policy, kernel)
    t = experience.trajectory
    algorithm = chunk_grpo(
        ChunkPlan((1,) * 7), kernel, ratio="squared_error", updates=1,
        selection=UniformSelection(1.0), trust=NoTrustRegion(),
    )  # fmt: skip
    shift(0.05)(policy)
    replayed = chunk_grpo(
        algorithm.plan, kernel, ratio="squared_error", updates=2,
        selection=UniformSelection(1.0), trust=NoTrustRegion(),
    )  # fmt: skip
    for _, _, parts in collect(replayed, policy, experience)[1:]:
        for part in parts:
            d = part.diagnostics
            if "chunk_log_ratio" not in d:
                continue
            samples = samples_of(parts)
            errors = []
            for i in range(7):
                x, s, n = t.states[samples, i], t.sigmas[i], t.sigmas[i + 1]
                v = policy.velocity(x, s.expand(len(x)), t.conditioning_of(samples))
                old = kernel(x, t.velocities[samples, i], s, n)
                after = t.states[samples, i + 1]
                new_error = (after - kernel(x, v, s, n).mean).square().mean(1)
                errors.append((after - old.mean).square().mean(1) - new_error)
            expected = torch.stack(errors, 1).detach().double()
            order = torch.argsort(d["chunk"], stable=True)
            got = d["chunk_log_ratio"][order].double()
            torch.testing.assert_close(
                got.sort().values, expected.flatten().sort().values, rtol=1e-3, atol=1e-7
            )


@pytest.mark.parametrize("micro_batch", [2, 5, 1000])
@pytest.mark.parametrize("anchor", ["rollout", "replay"])
def test_shared_first_step_costs_a_row_a_prompt_and_changes_nothing(micro_batch, anchor):
    policy = toy()
    trajectory = rollout(
        policy, PROMPTS, FLOW, SIGMAS, 8, seeded(1), keep_velocities=True, same_noise=True
    )
    rewards = torch.randn(24, generator=seeded(2))
    experience = Experience(trajectory, group_advantages(rewards, 3).values)
    apart = Experience(replace(trajectory, shared_start=False), experience.advantages)
    algorithm = chunk_grpo(
        PLAN, FLOW, UniformSelection(1.0), trust=Clip(1e-3, 1e-3), updates=2,
        micro_batch=micro_batch, anchor=anchor, kl=TransitionKl(0.1),
    )  # fmt: skip
    results, rows = [], []
    for given in (experience, apart):
        policy = toy()
        results.append(collect(algorithm, policy, given, move=shift(0.05)))
        rows.append(sum(policy.calls))
        assert max(policy.calls) <= micro_batch
    for (value, gradient, _), (expected, expected_gradient, _) in zip(*results, strict=True):
        close(value, expected, 1e-5)
        close(gradient, expected_gradient, 1e-5)
    # Two updates of 12 samples; each has the 3 prompts (or those drawn), instead of 12 first steps.
    assert rows[0] < rows[1] * 0.92


@pytest.mark.parametrize("start", [0, 3, 6])
def test_weights_in_a_window_are_those_of_the_whole_schedule(start):
    """A branch at a noisy step counts more than one at a quiet step: TempFlow-GRPO."""
    policy = toy()
    experience = experience_with_velocities(policy, window=range(start, start + 1))
    gradients = {}
    for weights in (NoOuterWeights(), NoiseLevelWeights()):
        algorithm = chunk_grpo(
            ChunkPlan((1,)), FLOW, UniformSelection(1.0), updates=1, outer_weights=weights
        )
        ((_, gradients[weights.kind], _),) = collect(algorithm, policy, experience)
    levels = SIGMAS.double().tolist()
    stds = [
        0.7 * (s / (1 - (n if s == 1 else s))) ** 0.5 * (s - n) ** 0.5
        for s, n in itertools.pairwise(levels[:-1])
    ]
    factor = stds[start] / (sum(stds) / len(stds))
    assert abs(factor - 1) > 0.05
    close(gradients["noise_level"], factor * gradients["none"], 1e-5)


@pytest.mark.parametrize("start", [0, 3, 6])
def test_inner_weights_in_a_window_are_those_of_its_own_steps(start):
    """The gradient of a chunk of one step is a times that without weights, a of that very step."""
    from chunkgrpo.core.step_weights import equal_kappa_weights

    policy = toy()
    experience = experience_with_velocities(policy, window=range(start, start + 1))
    gradients = {}
    for weights in ("none", "equal_kappa"):
        algorithm = chunk_grpo(
            ChunkPlan((1,)), FLOW, UniformSelection(1.0), updates=1, inner_weights=weights
        )
        ((_, gradients[weights], _),) = collect(algorithm, policy, experience)
    factors = equal_kappa_weights(transition_scale(FLOW, SIGMAS[:-1])).tolist()
    assert len({round(factor, 3) for factor in factors}) == len(factors)
    close(gradients["equal_kappa"], factors[start] * gradients["none"], 1e-5)
