# SPDX-License-Identifier: Apache-2.0
"""AWM's pseudo-log-probabilities and times against plain arithmetic and known limits."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chunkgrpo.core.awm import (
    AnyPseudoLogProb,
    GeneralHuberLogProb,
    HuberLogProb,
    LinearLogProb,
    QuadraticLogProb,
    UniformLogProb,
    ghuber_log_prob,
    huber_log_prob,
    linear_log_prob,
    quadratic_log_prob,
    scaled_advantages,
    stratified_times,
    uniform_log_prob,
)
from chunkgrpo.core.forward_process import matching_error, noisy
from chunkgrpo.core.names import ByKind
from chunkgrpo.core.sde import predict_clean
from closed_forms import drawn, seeded

# --- AWM ---------------------------------------------------------------------------------------


def test_advantages_are_clamped_then_scaled():
    advantages = torch.tensor([-8.0, -5.0, -1.0, 0.0, 2.5, 9.0])
    assert scaled_advantages(advantages, 5.0, 1.0).tolist() == pytest.approx(
        [-1, -1, -0.2, 0, 0.5, 1]
    )
    assert scaled_advantages(advantages, 5.0, 5.0).tolist() == [-5, -5, -1, 0, 2.5, 5]


FUNCTIONS = {
    UniformLogProb(): uniform_log_prob,
    LinearLogProb(): linear_log_prob,
    QuadraticLogProb(): quadratic_log_prob,
    HuberLogProb(): huber_log_prob,
    GeneralHuberLogProb(): ghuber_log_prob,
}


@given(e=st.floats(0, 50), t=st.floats(0.001, 1), p=st.floats(0.05, 1.5))
def test_pseudo_log_probs_in_plain_arithmetic(e, t, p):
    error, sigma = (torch.tensor([x], dtype=torch.float64) for x in (e, t))
    expected = {
        UniformLogProb(): -e,
        LinearLogProb(): -t * e,
        QuadraticLogProb(): -(t**2) * e,
        HuberLogProb(): -t * (math.sqrt(e + 1e-10) - 1e-5),
        GeneralHuberLogProb(p): -(t / p) * ((e + 1e-10) ** p - 1e-10**p),
    }
    assert {choice.kind for choice in expected} == set(ByKind.kinds(AnyPseudoLogProb.__origin__))
    for choice, value in expected.items():
        found = choice(error, sigma).item()
        assert found == pytest.approx(value, rel=1e-9, abs=1e-12), choice


def test_choices_are_their_functions():
    kinds = ByKind.kinds(AnyPseudoLogProb.__origin__)
    assert list(kinds) == ["uniform", "t", "t2", "huber", "ghuber"]
    assert list(kinds.values()) == [type(choice) for choice in FUNCTIONS]
    error, sigma = drawn(4).square(), torch.rand(4, generator=seeded(1))
    for choice, function in FUNCTIONS.items():
        assert torch.equal(choice(error, sigma), function(error, sigma))
    half = GeneralHuberLogProb(0.5)
    assert torch.equal(half(error, sigma), ghuber_log_prob(error, sigma, 0.5))
    assert not torch.allclose(ghuber_log_prob(error, sigma), half(error, sigma))
    for power in (0, -0.25, math.nan):
        with pytest.raises(ValueError, match=rf"power is {power}; it must be positive"):
            GeneralHuberLogProb(power)


def test_limits_of_the_generalised_huber():
    error = torch.tensor([0.0, 0.01, 1.0, 7.0], dtype=torch.float64)
    sigma = torch.tensor([0.5, 1.0, 0.25, 0.9], dtype=torch.float64)
    whole = ghuber_log_prob(error, sigma, 1.0)
    assert torch.allclose(whole, linear_log_prob(error, sigma), atol=1e-12)
    assert torch.allclose(whole / sigma, uniform_log_prob(error, sigma), atol=1e-12)
    half = ghuber_log_prob(error, sigma, 0.5)
    assert torch.allclose(half, 2 * huber_log_prob(error, sigma), atol=1e-12)
    # p -> 0 is the logarithm of the error, which makes the slope -t / e.
    small = ghuber_log_prob(error, sigma, 1e-9)
    logarithm = -sigma * ((error + 1e-10).log() - math.log(1e-10))
    assert torch.allclose(small, logarithm, rtol=1e-6)
    for choice in FUNCTIONS:
        at_zero = choice(torch.zeros(4), sigma.float())
        assert at_zero.abs().max() < 1e-8


@pytest.mark.parametrize("power", [0.25, 0.5, 1.0])
def test_the_slope_of_the_generalised_huber(power):
    error = torch.tensor([0.01, 1.0, 7.0], dtype=torch.float64, requires_grad=True)
    sigma = torch.tensor([1.0, 0.25, 0.9], dtype=torch.float64)
    ghuber_log_prob(error, sigma, power).sum().backward()
    expected = -sigma * (error.detach() + 1e-10) ** (power - 1)
    assert torch.allclose(error.grad, expected, rtol=1e-10)


def test_t_squared_measures_the_clean_latent():
    velocity, clean, noise = (drawn(3, 6, seed=s) for s in range(3))
    sigma = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    predicted = predict_clean(noisy(clean, noise, sigma), velocity, sigma)
    found = quadratic_log_prob(matching_error(velocity, clean, noise), sigma)
    assert torch.allclose(found, -(predicted - clean).square().mean(1), rtol=1e-10)


# --- times -------------------------------------------------------------------------------------


@given(
    num_steps=st.integers(2, 40),
    share=st.floats(0, 1),
    num_samples=st.integers(1, 8),
    seed=st.integers(0, 2**31),
)
def test_stratified_times_take_one_of_each_stratum(num_steps, share, num_samples, seed):
    num_choices = num_steps - 1
    num_times = 1 + int(share * (num_choices - 1))
    times = stratified_times(num_steps, num_times, num_samples, seeded(seed))
    assert times.shape == (num_samples, num_times) and times.dtype == torch.int64
    edges = [1 + k * num_choices // num_times for k in range(num_times + 1)]
    assert edges[0] == 1 and edges[-1] == num_steps
    for row in times.tolist():
        for k, index in enumerate(row):
            assert edges[k] <= index < edges[k + 1]
        assert row == sorted(set(row))


def test_stratified_times_are_uniform_within_their_strata():
    counts = torch.bincount(stratified_times(10, 3, 9000, seeded()).flatten(), minlength=10)
    assert counts[0] == 0
    # Nine choices in three strata: each is drawn by a third of the samples.
    assert (counts[1:] - 3000).abs().max() < 5 * math.sqrt(9000 * (1 / 3) * (2 / 3))


def test_samples_choose_their_own_times():
    times = stratified_times(17, 4, 64, seeded())
    assert len({tuple(row) for row in times.tolist()}) > 50
    assert torch.equal(times, stratified_times(17, 4, 64, seeded()))
    assert not torch.equal(times, stratified_times(17, 4, 64, seeded(1)))


def test_as_many_times_as_steps_takes_all_but_the_first():
    assert stratified_times(6, 5, 2, seeded()).tolist() == [[1, 2, 3, 4, 5]] * 2


@pytest.mark.parametrize("num_times", [0, 10])
def test_too_many_times_are_refused(num_times):
    with pytest.raises(ValueError, match=rf"num_times is {num_times}; a schedule of 10 steps off"):
        stratified_times(10, num_times, 2, seeded())
