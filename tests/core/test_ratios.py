# SPDX-License-Identifier: Apache-2.0
"""Ratios, their scales and the coefficients of steps against autograd and closed forms."""

import math

import pytest
import torch
from torch.distributions import Normal

from chunkgrpo.core.plans import ChunkPlan, paper_plan, step_plan, whole_plan
from chunkgrpo.core.ratios import (
    chunk_log_ratio,
    policy_gradient_scale,
    ratio_scale,
    step_coefficients,
    transition_scale,
)
from chunkgrpo.core.schedules import make_sigmas
from chunkgrpo.core.sde import (
    CpsTransition,
    DanceDiffusion,
    FlowDiffusion,
    Gaussian,
    OdeDiffusion,
    Transition,
)
from closed_forms import tensor


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


def test_step_coefficients_by_hand():
    chosen = torch.tensor([[True, False, True], [False, True, False]])
    slope = torch.tensor([[-6.0, 1.0, 8.0], [math.inf, 3.0, math.nan]], dtype=torch.float64)
    plan = ChunkPlan((2, 3, 1))
    expected = torch.tensor(
        [[-1.5, -1.5, 0.0, 0.0, 0.0, 4.0], [0.0, 0.0, 0.5, 0.5, 0.5, 0.0]], dtype=torch.float64
    )
    assert torch.allclose(step_coefficients(chosen, slope, plan, 2.0), expected)
    assert torch.allclose(step_coefficients(chosen, slope, plan, torch.tensor(2.0)), expected)


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


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("per_dimension", [1.0, 1.0]),
        ("full", [12.0, 12.0]),
        ("guard", [0.5, 0.2]),
        ("squared_error", [0.5, 0.08]),
    ],
)
def test_ratio_scales_by_hand(form, expected):
    found = ratio_scale(form, tensor(0.5, 0.2), 12)
    assert found.tolist() == pytest.approx(expected, rel=1e-12)
    assert ratio_scale(form, torch.tensor([0.5]).bfloat16(), 12).dtype == torch.float32


@pytest.mark.parametrize("form", ["per_dimension", "full", "guard", "squared_error"])
def test_ratio_scales_turn_the_log_ratio_into_the_published_one(form):
    """Each form from densities and means, without the scale."""
    std, size = 0.3, 7
    generator = torch.Generator().manual_seed(0)
    value, mean, old_mean = torch.randn(3, 1, size, generator=generator, dtype=torch.float64)
    new, old = Normal(mean, std), Normal(old_mean, std)
    per_element = new.log_prob(value) - old.log_prob(value)
    bias = (mean - old_mean).square().mean() / (2 * std**2)
    published = {
        "per_dimension": per_element.mean(),
        "full": per_element.sum(),
        "guard": (per_element.mean() + bias) * std,
        "squared_error": (value - old_mean).square().mean() - (value - mean).square().mean(),
    }[form]
    ours = Gaussian(mean, tensor(std)).log_prob_per_dim(value)
    ours = ours - Gaussian(old_mean, tensor(std)).log_prob_per_dim(value)
    if form == "guard":
        ours = ours + Gaussian(mean, tensor(std)).kl_per_dim(Gaussian(old_mean, tensor(std)))
    scaled = ours * ratio_scale(form, tensor(std), size)
    assert scaled.item() == pytest.approx(published.item(), rel=1e-10)


def test_guard_gives_every_step_a_centred_ratio_of_one_spread():
    """With x' = mu_old + s eps: guard = -eps . (mu_old - mu) / D, free of s and of any bias."""
    generator = torch.Generator().manual_seed(0)
    eps = torch.randn(3, 50, generator=generator, dtype=torch.float64)
    shift = torch.randn(1, 50, generator=generator, dtype=torch.float64)
    for std in (0.05, 0.7):
        old, new = Gaussian(0 * eps, tensor(std)), Gaussian(shift + 0 * eps, tensor(std))
        value = old.sample(noise=eps)
        log_ratio = new.log_prob_per_dim(value) - old.log_prob_per_dim(value)
        guarded = (log_ratio + new.kl_per_dim(old)) * ratio_scale("guard", tensor(std), 50)
        assert torch.allclose(guarded, (eps * shift).mean(1), rtol=1e-9, atol=1e-12)


def test_unknown_ratio_forms_are_refused():
    message = "'sum'; it must be one of per_dimension, full, guard, squared_error"
    with pytest.raises(ValueError, match=message):
        ratio_scale("sum", tensor(1.0), 1)


@pytest.mark.parametrize(
    "kernel",
    [Transition(FlowDiffusion(0.7)), Transition(DanceDiffusion(0.3)), CpsTransition(0.9)],
    ids=str,
)
def test_transition_scale_is_the_derivative_of_the_mean_over_the_std(kernel):
    sigmas = make_sigmas(17).double()[:-1]
    found = transition_scale(kernel, sigmas)
    assert found.shape == (16,)
    for i in range(16):
        v = torch.tensor([[0.3]], dtype=torch.float64, requires_grad=True)
        x = torch.tensor([[0.7]], dtype=torch.float64)
        step = kernel(x, v, sigmas[i], sigmas[i + 1])
        (slope,) = torch.autograd.grad(step.mean.sum(), v)
        assert found[i].item() == pytest.approx(abs(slope.item()) / step.std.item(), rel=1e-10)
    if isinstance(kernel, Transition):
        closed = policy_gradient_scale(make_sigmas(17).double(), kernel.diffusion)[:-1]
        assert torch.allclose(found, closed, rtol=1e-12)
    else:
        # mu = x0_hat (1 - s') + kept x1_hat, so dmu/dv = -sigma (1 - s') + kept (1 - sigma).
        s, n, angle = sigmas[:-1], sigmas[1:], 0.9 * math.pi / 2
        by_hand = (-s * (1 - n) + n * math.cos(angle) * (1 - s)).abs() / (n * math.sin(angle))
        assert torch.allclose(found, by_hand, rtol=1e-12)
