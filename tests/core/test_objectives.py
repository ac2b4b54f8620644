# SPDX-License-Identifier: Apache-2.0
"""The surrogate and its pieces against autograd, closed forms and torch.distributions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from chunkgrpo.core.chunks import ChunkPlan, paper_plan, step_plan, whole_plan
from chunkgrpo.core.objectives import (
    chunk_log_ratio,
    clipped_surrogate,
    gradient_is_cut,
    k3_kl,
    policy_gradient_scale,
    ratio_diagnostics,
    reference_kl,
    step_coefficients,
    surrogate_slope,
)
from chunkgrpo.core.schedules import make_sigmas
from chunkgrpo.core.sde import DanceDiffusion, FlowDiffusion, Gaussian, OdeDiffusion, Transition

log_ratios = st.floats(-2.0, 2.0)
signed = st.floats(-3.0, 3.0)
clips = st.floats(0.0, 0.9)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_chunk_log_ratio_is_the_log_of_the_geometric_mean():
    new = torch.randn(3, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    old = torch.randn(3, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    step_ratios = (new - old).exp()
    parts = step_ratios.split([2, 3, 4, 7], dim=1)
    expected = torch.stack([part.prod(1) ** (1 / part.shape[1]) for part in parts], 1)
    assert torch.allclose(chunk_log_ratio(new, old, paper_plan(16)).exp(), expected, rtol=1e-12)
    assert torch.equal(chunk_log_ratio(new, old, step_plan(16)), new - old)
    sequence = step_ratios.prod(1) ** (1 / 16)
    assert torch.allclose(chunk_log_ratio(new, old, whole_plan(16)).exp()[:, 0], sequence)
    assert torch.equal(chunk_log_ratio(old, old, paper_plan(16)), tensor(0).expand(3, 4))


@given(log_ratio=log_ratios, advantage=signed, low=clips, high=clips)
def test_surrogate_in_plain_arithmetic(log_ratio, advantage, low, high):
    ratio = math.exp(log_ratio)
    clipped = min(max(ratio, 1 - low), 1 + high)
    expected = -min(ratio * advantage, clipped * advantage)
    loss = clipped_surrogate(tensor(log_ratio), tensor(advantage), low, high)
    assert loss.item() == pytest.approx(expected, rel=1e-12, abs=1e-15)


@given(log_ratio=log_ratios, advantage=signed, low=clips, high=clips)
def test_slope_equals_autograd(log_ratio, advantage, low, high):
    log_ratio = tensor(log_ratio).requires_grad_()
    clipped_surrogate(log_ratio, tensor(advantage), low, high).sum().backward()
    slope = surrogate_slope(log_ratio.detach(), tensor(advantage), low, high)
    assert slope.item() == pytest.approx(log_ratio.grad.item(), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope"),
    [
        (1.5, 2.0, 0.0),  # better action, already likelier than the range allows: stop
        (1.5, -2.0, 3.0),  # worse action became likelier: full force back
        (0.5, -2.0, 0.0),  # worse action, already unlikely enough: stop
        (0.5, 2.0, -1.0),  # better action became unlikelier: keep pushing
        (1.1, 2.0, -2.2),  # inside the range
        (0.9, -2.0, 1.8),
        (1.0, 2.0, -2.0),  # on-policy: -A
        (1.5, 0.0, 0.0),
    ],
)
def test_slope_in_every_region(ratio, advantage, slope):
    log_ratio = tensor(math.log(ratio)).requires_grad_()
    found = surrogate_slope(log_ratio.detach(), tensor(advantage), 0.2, 0.2)
    assert found.item() == pytest.approx(slope)
    clipped_surrogate(log_ratio, tensor(advantage), 0.2, 0.2).backward(torch.ones(1).double())
    assert log_ratio.grad.item() == pytest.approx(slope)
    is_cut = gradient_is_cut(log_ratio, tensor(advantage), 0.2, 0.2).item()
    assert is_cut == (slope == 0 and advantage != 0)


@pytest.mark.parametrize(("low", "high"), [(0.1, 0.3), (0.3, 0.1), (0.0, 0.5), (0.5, 0.0)])
def test_slope_equals_autograd_on_a_grid_with_unequal_clips(low, high):
    log_ratio = torch.linspace(-0.9, 0.9, 182, dtype=torch.float64).repeat(2, 1).requires_grad_()
    advantages = tensor(1.7, -0.6)
    clipped_surrogate(log_ratio, advantages, low, high).sum().backward()
    slope = surrogate_slope(log_ratio.detach(), advantages, low, high)
    assert torch.allclose(slope, log_ratio.grad, rtol=1e-12, atol=0)
    cut = gradient_is_cut(log_ratio.detach(), advantages, low, high)
    ratio = log_ratio.detach()[0].exp()
    assert torch.equal(cut, torch.stack([ratio > 1 + high, ratio < 1 - low]))


def test_slope_agrees_with_autograd_at_published_float32_clips():
    # The range 5e-5 is only some 400 float32 spacings wide; both must round its ends alike.
    log_ratio = torch.linspace(-1.2e-4, 1.2e-4, 4001).repeat(2, 1).requires_grad_()
    advantages = torch.tensor([1.0, -1.0])
    clipped_surrogate(log_ratio, advantages, 5e-5, 5e-5).sum().backward()
    slope = surrogate_slope(log_ratio.detach(), advantages, 5e-5, 5e-5)
    assert torch.equal(slope, log_ratio.grad)


def test_advantages_follow_the_samples_not_the_chunks():
    log_ratio = torch.zeros(2, 2, dtype=torch.float64)
    per_sample = clipped_surrogate(log_ratio, tensor(1.0, -3.0), 0.1, 0.1)
    assert per_sample.tolist() == [[-1.0, -1.0], [3.0, 3.0]]
    per_chunk = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    assert torch.equal(clipped_surrogate(log_ratio, per_chunk, 0.1, 0.1), -per_chunk)
    assert torch.equal(surrogate_slope(log_ratio, tensor(1.0, -3.0), 0.1, 0.1), per_sample)


def test_step_coefficients_by_hand():
    chosen = torch.tensor([[True, False, True], [False, True, False]])
    slope = torch.tensor([[-6.0, 1.0, 8.0], [math.inf, 3.0, math.nan]], dtype=torch.float64)
    plan = ChunkPlan((2, 3, 1))
    expected = torch.tensor(
        [[-1.5, -1.5, 0.0, 0.0, 0.0, 4.0], [0.0, 0.0, 0.5, 0.5, 0.5, 0.0]], dtype=torch.float64
    )
    assert torch.allclose(step_coefficients(chosen, slope, plan, 2.0), expected)
    assert torch.allclose(step_coefficients(chosen, slope, plan, torch.tensor(2.0)), expected)


@given(st.floats(-5.0, 5.0))
def test_k3_in_plain_arithmetic_and_never_negative(r):
    value = k3_kl(tensor(r)).item()
    assert value >= 0
    assert value == pytest.approx(math.exp(-r) - 1 + r, abs=1e-12, rel=1e-9)


def test_k3_estimates_the_divergence_from_samples_of_the_new_policy():
    new, old = Normal(0.3, 1.0), Normal(0.0, 1.2)
    eps = torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    samples = 0.3 + eps
    estimate = k3_kl(new.log_prob(samples) - old.log_prob(samples))
    error = estimate.std() / math.sqrt(len(samples))
    assert abs(estimate.mean() - kl_divergence(new, old)) < 4 * error


def test_k3_is_quadratic_near_zero_in_float32():
    r = torch.tensor([1e-3, -1e-3])
    assert k3_kl(r).tolist() == pytest.approx([5e-7, 5e-7], rel=1e-2, abs=1e-10)
    assert k3_kl(torch.zeros(1)).item() == 0


def test_reference_kl_is_the_squared_shift_of_the_mean():
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    shift = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    std = torch.tensor(0.3, dtype=torch.float64)
    found = reference_kl(Gaussian(mean + shift, std), Gaussian(mean, std))
    assert torch.allclose(found, shift.square().mean((1, 2)) / (2 * 0.09), rtol=1e-12)


def test_diagnostics_by_hand_detached_and_zero_dimensional():
    ratios = torch.tensor([[1.5, 0.5], [1.5, 0.5]], dtype=torch.float64)
    log_ratio = ratios.log().requires_grad_()
    found = ratio_diagnostics(log_ratio, tensor(1.0, -2.0), 0.2, 0.2)
    assert set(found) == {"ratio_mean", "ratio_std", "clip_fraction", "approx_kl"}
    assert all(value.ndim == 0 and not value.requires_grad for value in found.values())
    assert found["ratio_mean"].item() == pytest.approx(1.0)
    assert found["ratio_std"].item() == pytest.approx(0.5)
    assert found["clip_fraction"].item() == 0.5
    expected_kl = (1 / 1.5 - 1 + math.log(1.5) + 1 / 0.5 - 1 + math.log(0.5)) / 2
    assert found["approx_kl"].item() == pytest.approx(expected_kl)
    alone = ratio_diagnostics(torch.zeros(1, 1), torch.ones(1), 0.2, 0.2)
    assert [alone[key].item() for key in sorted(alone)] == [0.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("diffusion", [FlowDiffusion(0.7), DanceDiffusion(0.3)])
def test_policy_gradient_scale_is_the_derivative_of_the_mean_over_the_std(diffusion):
    sigmas = make_sigmas(17).double()
    found = policy_gradient_scale(sigmas, diffusion)
    assert found.shape == (17,)
    for i in range(17):
        velocity = torch.tensor([[0.3]], dtype=torch.float64, requires_grad=True)
        x = torch.tensor([[0.7]], dtype=torch.float64)
        step = Transition(diffusion)(x, velocity, sigmas[i], sigmas[i + 1])
        (slope,) = torch.autograd.grad(step.mean.sum(), velocity)
        assert found[i].item() == pytest.approx(abs(slope.item()) / step.std.item(), rel=1e-10)


def test_policy_gradient_scale_needs_noise():
    for diffusion in (OdeDiffusion(), FlowDiffusion(0.0)):
        with pytest.raises(ValueError, match="no policy gradient"):
            policy_gradient_scale(make_sigmas(4), diffusion)
