# SPDX-License-Identifier: Apache-2.0
"""Divergences against closed forms, and the choices of a run."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from chunkgrpo.core.kl import NoKl, RateKl, TransitionKl, k3_kl, k3_slope, reference_kl
from chunkgrpo.core.sde import Gaussian
from closed_forms import tensor


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


@given(st.floats(-5.0, 5.0))
def test_k3_slope_is_the_difference_quotient(r):
    h = 1e-5
    quotient = (k3_kl(tensor(r + h)) - k3_kl(tensor(r - h))) / (2 * h)
    assert k3_slope(tensor(r)).item() == pytest.approx(quotient.item(), rel=1e-6, abs=1e-8)
    assert k3_slope(tensor(0.0)).item() == 0.0


# --- the choices of a run -----------------------------------------------------------------------


def test_a_rate_is_the_transitions_kl_times_dt():
    """Flow-GRPO divides the squared shift by 2 g^2, and the transition's variance is g^2 dt."""
    dt, g, shift = tensor(0.1, 0.25), 0.6, tensor(0.03, -0.02)
    std = (g * dt.sqrt())[:, None]
    divergence = reference_kl(Gaussian(shift[:, None], std), Gaussian(0 * std, std))
    assert torch.equal(RateKl(0.04).scale(dt), dt)
    rate = divergence * RateKl(0.04).scale(dt)
    assert torch.allclose(rate, shift.square() / (2 * g**2), rtol=1e-12)
    for choice in (NoKl(), TransitionKl(0.1)):
        assert torch.equal(choice.scale(dt), torch.ones(2).double())


def test_kls_by_kind():
    assert (NoKl().weight, TransitionKl(0.1).weight, RateKl(0.04).weight) == (0.0, 0.1, 0.04)
    assert [kind.kind for kind in (NoKl(), TransitionKl(1), RateKl(1))] == [
        "none", "transition", "rate"
    ]  # fmt: skip


@pytest.mark.parametrize("weight", [0.0, -0.1, math.nan])
@pytest.mark.parametrize("choice", [TransitionKl, RateKl])
def test_weights_that_turn_it_off_or_around_are_refused(choice, weight):
    with pytest.raises(ValueError, match=f"weight is {weight}; it must be above 0; kind 'none'"):
        choice(weight)
