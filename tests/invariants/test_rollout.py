# SPDX-License-Identifier: Apache-2.0
"""Rollouts: what they may depend on, what they keep, and what they sample from.

Axes: P prompts, G samples each, B = P G; N trained steps.
"""

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from torch import Generator

from chunkgrpo.core import (
    ChunkPlan,
    DanceDiffusion,
    FlowDiffusion,
    OdeDiffusion,
    Transition,
    UniformSelection,
    make_sigmas,
)
from chunkgrpo.policies.toy import GaussianPolicy
from chunkgrpo.rollout import Sampler, Store
from chunkgrpo.runtime.seeds import NoiseSource, derive_seed
from chunkgrpo.types import Conditioning, Experience, as_prompts
from compose import chunk_grpo, rollout

SIGMAS = make_sigmas(6)
FLOW = Transition(FlowDiffusion(0.7))
ODE = Transition(OdeDiffusion())
SEEDS = list(range(100, 112))


def toy(dim=10):
    mean = torch.randn(dim, generator=Generator().manual_seed(5), dtype=torch.float64)
    return GaussianPolicy(mean, 0.5)


def assert_same(a, b, tolerance=0.0):
    for name in ("states", "old_log_prob", "final"):
        difference = (getattr(a, name) - getattr(b, name)).abs().max().item()
        scale = max(1.0, getattr(b, name).abs().max().item())
        assert difference <= tolerance * scale, (name, difference)


# --- what a sample may depend on ----------------------------------------------------------------


@pytest.mark.parametrize("same_noise", [False, True])
@pytest.mark.parametrize("transition", [FLOW, Transition(DanceDiffusion(0.3)), ODE])
def test_the_batch_size_changes_nothing(transition, same_noise):
    def run(batch_size):
        return rollout(
            toy(), ["a", "b", "c"], transition, SIGMAS, 4,
            seeds=SEEDS, same_noise=same_noise, batch_size=batch_size,
        )  # fmt: skip

    whole = run(64)
    for batch_size in (1, 5, 12):
        assert_same(run(batch_size), whole)


@pytest.mark.parametrize("same_noise", [False, True])
def test_the_order_of_prompts_changes_nothing(same_noise):
    forward = rollout(toy(), "abc", FLOW, SIGMAS, 4, seeds=SEEDS, same_noise=same_noise)
    seeds = SEEDS[8:] + SEEDS[4:8] + SEEDS[:4]
    backward = rollout(toy(), "cba", FLOW, SIGMAS, 4, seeds=seeds, same_noise=same_noise)
    order = torch.tensor([8, 9, 10, 11, 4, 5, 6, 7, 0, 1, 2, 3])
    assert torch.equal(backward.states, forward.states[order])
    assert torch.equal(backward.old_log_prob, forward.old_log_prob[order])
    assert torch.equal(backward.final, forward.final[order])


@pytest.mark.parametrize("same_noise", [False, True])
def test_a_network_sees_rounding_only(tiny_policy, same_noise):
    policy = tiny_policy(guidance=3.0)
    prompts = ["a red star", "two circles"]

    def run(prompts, seeds, batch_size):
        return rollout(
            policy, prompts, FLOW, SIGMAS, 3,
            seeds=seeds, same_noise=same_noise, batch_size=batch_size,
        )  # fmt: skip

    whole = run(prompts, SEEDS[:6], 64)
    assert whole.final.std() > 0.1
    assert_same(run(prompts, SEEDS[:6], 1), whole, 1e-5)
    assert_same(run(prompts, SEEDS[:6], 4), whole, 1e-5)
    swapped = run(prompts[::-1], SEEDS[3:6] + SEEDS[:3], 64)
    order = torch.tensor([3, 4, 5, 0, 1, 2])
    assert (swapped.final[order] - whole.final).abs().max() < 1e-5
    # Prompts do matter, or the check above would show nothing.
    other = run(prompts[::-1], SEEDS[:6], 64)
    assert (other.final - whole.final).abs().max() > 1e-4


def test_the_generator_gives_the_seeds():
    def run(seed):
        return rollout(toy(), ["a"], FLOW, SIGMAS, 4, Generator().manual_seed(seed))

    assert_same(run(1), run(1))
    assert (run(1).final - run(2).final).abs().min() > 0
    final = run(1).final
    assert len({tuple(row.tolist()) for row in final}) == 4


def test_it_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    rollout(toy(), ["a"], FLOW, SIGMAS, 4, Generator().manual_seed(1), same_noise=True)
    assert torch.equal(torch.get_rng_state(), before)


# --- one noise per group ------------------------------------------------------------------------


def test_same_noise_shares_the_first_state_and_the_first_velocity():
    policy = toy()
    trajectory = rollout(policy, "abc", FLOW, SIGMAS, 4, seeds=SEEDS, same_noise=True)
    first = trajectory.states[:, 0].unflatten(0, (3, 4))
    assert (first == first[:, :1]).all()
    assert not torch.equal(first[0], first[1])
    assert policy.calls == [3] + [12] * 5
    assert trajectory.num_evaluations == 3 + 5 * 12
    # Noise injected later differs within a group.
    second = trajectory.states[:, 1].unflatten(0, (3, 4))
    assert (second[:, 1:] != second[:, :1]).all()


def test_same_noise_equals_the_naive_computation():
    policy = toy()
    trajectory = rollout(policy, "abc", FLOW, SIGMAS, 4, seeds=SEEDS, same_noise=True)
    source = NoiseSource([derive_seed(seed, 2) for seed in SEEDS])
    x = NoiseSource([SEEDS[b - b % 4] for b in range(12)]).draw((10,))
    for i in range(5):
        assert torch.equal(trajectory.states[:, i], x)
        sigma, sigma_next = trajectory.sigmas[i], trajectory.sigmas[i + 1]
        v = policy.velocity(x, sigma.expand(12), trajectory.conditioning_of(slice(None)))
        step = FLOW(x, v, sigma, sigma_next)
        x = (step.mean + step.std * source.draw((10,))).float()
    assert torch.equal(trajectory.states[:, 5], x)


class TextPolicy(GaussianPolicy):
    """The toy whose velocity depends on the prompt; it counts the rows it encodes."""

    def __init__(self, mean, std):
        super().__init__(mean, std)
        self.encoded = []

    def encode(self, prompts):
        prompts = as_prompts(prompts)
        self.encoded.append(len(prompts))
        return Conditioning({"rows": torch.tensor([[float(ord(p.text))] for p in prompts])})

    def velocity(self, x, sigma, conditioning):
        return super().velocity(x, sigma, conditioning) + 0.01 * conditioning.tensors["rows"]


@pytest.mark.parametrize("same_noise", [True, False])
def test_encoded_prompts_are_kept_once_a_prompt(same_noise):
    policy = TextPolicy(torch.zeros(10, dtype=torch.float64), 0.5)
    trajectory = rollout(
        policy, "abc", FLOW, SIGMAS, 4, seeds=SEEDS, same_noise=same_noise, batch_size=5
    )
    assert policy.encoded == [3] and len(trajectory.conditioning) == 3
    expected = torch.tensor([float(ord(c)) for c in "aaaabbbbcccc"])[:, None]
    sample = torch.tensor([11, 0, 4, 3])
    assert torch.equal(trajectory.conditioning_of(sample).tensors["rows"], expected[sample])
    for part in (slice(None), slice(2, 9), slice(1, None, 4)):
        assert torch.equal(trajectory.conditioning_of(part).tensors["rows"], expected[part])
    # Each sample went its own prompt's way, wherever batches were cut.
    for i, prompt in enumerate("abc"):
        rows = slice(4 * i, 4 * i + 4)
        alone = rollout(policy, [prompt], FLOW, SIGMAS, 4, seeds=SEEDS[rows], same_noise=same_noise)
        torch.testing.assert_close(trajectory.final[rows], alone.final, rtol=0, atol=1e-6)


# --- what is kept -------------------------------------------------------------------------------


def test_the_last_step_is_deterministic():
    policy = toy()
    trajectory = rollout(policy, "ab", FLOW, SIGMAS, 3, seeds=SEEDS[:6])
    assert trajectory.states.shape == (6, 6, 10) and trajectory.num_trained == 5
    assert trajectory.num_prompts == 2 and trajectory.group_size == 3
    x, sigma = trajectory.states[:, -1], trajectory.sigmas[-2]
    v = policy.velocity(x, sigma.expand(6), trajectory.conditioning_of(slice(None))).detach()
    assert torch.allclose(trajectory.final, (x - sigma * v).float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("diffusion", [FlowDiffusion(0.7), DanceDiffusion(0.3)])
def test_log_probs_are_those_of_the_normal_distribution(diffusion):
    policy, transition = toy(), Transition(diffusion)
    trajectory = rollout(policy, "ab", transition, SIGMAS, 3, seeds=SEEDS[:6])
    for i in range(trajectory.num_trained):
        x, (sigma, sigma_next) = trajectory.states[:, i], trajectory.sigmas[i : i + 2]
        v = policy.velocity(x, sigma.expand(6), trajectory.conditioning_of(slice(None))).detach()
        g = diffusion(sigma, sigma_next)
        dt = sigma - sigma_next
        mean = x - dt * (v + g**2 / (2 * sigma) * (x + (1 - sigma) * v))
        normal = torch.distributions.Normal(mean, (g * dt.sqrt()).double())
        expected = normal.log_prob(trajectory.states[:, i + 1].double()).mean(1)
        assert torch.allclose(trajectory.old_log_prob[:, i].double(), expected, atol=1e-5)


def test_the_ode_is_eulers_method():
    policy = toy()
    trajectory = rollout(policy, "ab", ODE, SIGMAS, 3, seeds=SEEDS[:6])
    assert (trajectory.old_log_prob == 0).all()
    x = trajectory.states[:, 0].double()
    for sigma, sigma_next in pairwise(SIGMAS):
        v = policy.velocity(x, sigma.expand(6), trajectory.conditioning_of(slice(None))).detach()
        x = x + (sigma_next - sigma) * v
    assert torch.allclose(trajectory.final.double(), x, rtol=0, atol=1e-6)


def test_rows_are_counted_and_progress_is_told():
    seen = []
    trajectory = rollout(
        toy(), "abc", FLOW, SIGMAS, 4,
        seeds=SEEDS, batch_size=5, progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert trajectory.num_evaluations == 12 * 6
    assert seen[:3] == [(5, 72), (10, 72), (15, 72)] and seen[-1] == (72, 72)
    seen.clear()
    rollout(
        toy(), "abc", FLOW, SIGMAS, 4, seeds=SEEDS, same_noise=True,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen[0] == (3, 63) and seen[-1] == (63, 63)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="3 seeds for 4 samples"):
        rollout(toy(), "ab", FLOW, SIGMAS, 2, seeds=[1, 2, 3])
    with pytest.raises(ValueError, match="at least one prompt and one image, got 0, 2"):
        rollout(toy(), [], FLOW, SIGMAS, 2)
    with pytest.raises(ValueError, match="at least one prompt and one image, got 1, 0"):
        rollout(toy(), ["a"], FLOW, SIGMAS, 0)
    with pytest.raises(ValueError, match="sigma"):
        rollout(toy(), ["a"], FLOW, SIGMAS.flip(0), 2)


# --- what is sampled ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("diffusion", "num_steps", "tolerance"),
    [
        (FlowDiffusion(0.7), 200, 0.02),
        (FlowDiffusion(0.3), 200, 0.02),
        (DanceDiffusion(0.3), 200, 0.02),
        (DanceDiffusion(1.0), 200, 0.02),
        (OdeDiffusion(), 200, 0.02),
    ],
)
def test_samples_have_the_mean_and_spread_of_the_data(diffusion, num_steps, tolerance):
    """100,000 independent elements: sampling errors of 0.002; the rest is the step size."""
    m, s = 0.7, 0.5
    policy = GaussianPolicy(torch.full((12_500,), m, dtype=torch.float64), s)
    trajectory = rollout(
        policy, ["a"], Transition(diffusion), make_sigmas(num_steps, 1.0), 8, seeds=SEEDS[:8]
    )
    final = trajectory.final.double()
    assert final.mean().item() == pytest.approx(m, abs=tolerance)
    assert final.std().item() == pytest.approx(s, abs=tolerance)
    # The shape is normal as well.
    z = (final - final.mean()) / final.std()
    assert z.pow(3).mean().abs() < 0.03
    assert z.pow(4).mean().item() == pytest.approx(3, abs=0.1)


@pytest.mark.parametrize("diffusion", [FlowDiffusion(0.7), DanceDiffusion(0.3)])
def test_the_spread_at_few_steps_is_the_one_the_recursion_predicts(diffusion):
    """A linear step maps a variance to a variance: the sampler has to follow it exactly."""
    s = 0.5
    policy = GaussianPolicy(torch.zeros(25_000, dtype=torch.float64), s)
    trajectory = rollout(policy, ["a"], Transition(diffusion), SIGMAS, 8, seeds=SEEDS[:8])
    variance = 1.0
    for i, (sigma, sigma_next) in enumerate(pairwise(SIGMAS)):
        measured = trajectory.states[:, i].double().var().item()
        assert measured == pytest.approx(variance, rel=0.02)
        dt = sigma - sigma_next
        slope = (sigma - (1 - sigma) * s**2) / ((1 - sigma) ** 2 * s**2 + sigma**2)
        if i == len(SIGMAS) - 2:
            variance = (1 - sigma * slope) ** 2 * variance
            break
        g = diffusion(sigma, sigma_next)
        factor = 1 - dt * (slope + g**2 / (2 * sigma) * (1 + (1 - sigma) * slope))
        variance = float(factor**2 * variance + g**2 * dt)
    assert trajectory.final.double().std().item() == pytest.approx(math.sqrt(variance), rel=0.01)


# --- how states wait for training ---------------------------------------------------------------


def test_states_outside_the_window_are_not_kept():
    run = rollout(toy(), ["a"], FLOW, SIGMAS, 2, seeds=[1, 2], window=range(1, 3))
    assert run.states.shape == (2, 3, 10) and run.old_log_prob.shape == (2, 2)
    every = rollout(toy(), ["a"], FLOW, SIGMAS, 2, seeds=[1, 2])
    assert every.states.shape == (2, 6, 10)


def losses(policy, trajectory, anchor="rollout"):
    """Log-ratios and the gradient before any update, trained in batches unlike the rollout's."""
    algorithm = chunk_grpo(
        ChunkPlan((2, 3)), FLOW, UniformSelection(1.0), updates=2, micro_batch=7,
        anchor=anchor, consistency=0.1, ratio="guard",
    )  # fmt: skip
    experience = Experience(trajectory, torch.linspace(-1, 1, trajectory.num_samples))
    ratios = []
    for parameter in policy.parameters():
        parameter.grad = None
    for part in algorithm.losses(policy, experience, Generator().manual_seed(0)):
        part.backward()
        if "log_ratio" in part.diagnostics:
            ratios.append(part.diagnostics["log_ratio"])
    grads = [p.grad.flatten() for p in policy.parameters() if p.grad is not None]
    return torch.cat(ratios), torch.cat(grads)


def sampled(policy, store, **options):
    prompts = ["a red star", "two circles"]
    return rollout(
        policy, prompts, FLOW, SIGMAS, 4, seeds=SEEDS[:8], keep_velocities=True, store=store,
        **options,
    )  # fmt: skip


@pytest.mark.parametrize("same_noise", [False, True])
def test_states_in_host_memory_are_the_same_bits(tiny_policy, same_noise):
    policy = tiny_policy()
    plain = sampled(policy, Store(), same_noise=same_noise)
    host = sampled(policy, Store("host"), same_noise=same_noise)
    assert host.states.device.type == "cpu" and host.device == policy.device
    assert_same(host, plain)
    for a, b in zip(losses(policy, plain), losses(policy, host), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("same_noise", [False, True])
def test_states_in_bfloat16_leave_ratios_exact(tiny_policy, same_noise, monkeypatch):
    """What is stored is what was sampled; rounding after the fact is the way not to do it."""
    policy = tiny_policy()
    exact = sampled(policy, Store(), same_noise=same_noise)
    rounded = sampled(policy, Store("host", "bfloat16"), same_noise=same_noise)
    assert rounded.states.dtype == torch.bfloat16
    assert rounded.velocities is not None and rounded.velocities.dtype == torch.float32
    naive = dataclasses.replace(exact, states=exact.states.to(torch.bfloat16))
    largest = {
        name: float(losses(policy, trajectory)[0].abs().max())
        for name, trajectory in (("exact", exact), ("rounded", rounded), ("naive", naive))
    }
    print("largest |log-ratio|", {name: f"{value:.1e}" for name, value in largest.items()})
    assert largest["exact"] < 1e-6 and largest["rounded"] < 1e-6
    assert largest["naive"] > 5e-5  # more than a published clip range
    # Samples move by less than the noise they are made of.
    moved = (rounded.final - exact.final).norm() / exact.final.norm()
    assert 0 < moved < 0.02

    def velocity(x, sigma, conditioning, inner=policy.velocity):
        assert x.dtype == torch.float32
        return inner(x, sigma, conditioning)

    monkeypatch.setattr(policy, "velocity", velocity)
    losses(policy, rounded, "replay")


def test_a_rounded_sampler_keeps_the_marginals():
    """The closed-form Gaussian's final mean and spread, 4000 samples."""
    policy = toy(4)
    for store in (Store(), Store("device", "bfloat16")):
        run = rollout(
            policy, ["a"], FLOW, make_sigmas(24), 4000, seeds=list(range(4000)),
            batch_size=4000, store=store,
        )  # fmt: skip
        error = run.final.mean(0) - policy.mean.detach()
        assert error.abs().max() < 4 * 0.5 / 4000**0.5 + 0.02
        assert run.final.std(0).mean() == pytest.approx(0.5, abs=0.05)


def test_a_store_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"place of stored .* 'disk'.*; known: device, host"):
        Store("disk")
    with pytest.raises(ValueError, match=r"type of .* 'float16'.*; known: float32, bfloat16"):
        Store("host", "float16")


def test_a_grid_that_starts_below_1_starts_from_less_noise():
    """x = sigma_0 times unit noise, the same noise whatever sigma_0 is."""
    policy = GaussianPolicy(torch.zeros(64))
    first = []
    for start in (1.0, 0.5):
        sigmas = start * make_sigmas(4)
        seeds = [3, 4]
        sampler = Sampler(Transition(OdeDiffusion()), sigmas, window=range(1), same_noise=True)
        first.append(sampler.rollout(policy, ["a", "b"], seeds=seeds).state(slice(None), 0))
    torch.testing.assert_close(first[1], 0.5 * first[0])
    assert 0.8 < float(first[0].std()) < 1.2
