# SPDX-License-Identifier: Apache-2.0
"""The Gaussian against torch.distributions, the transition against independent derivations."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Independent, Normal, kl_divergence

from chunkgrpo.core.schedules import make_sigmas
from chunkgrpo.core.sde import (
    CpsTransition,
    DanceDiffusion,
    FlowDiffusion,
    Gaussian,
    OdeDiffusion,
    Transition,
    kernel_of,
    predict_clean,
    predict_noise,
    transition,
)

SHAPE = (3, 4, 5, 2)
SIZE = 40


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- Gaussian ---------------------------------------------------------------------------------


@pytest.mark.parametrize("std_shape", [(), (3, 1, 1, 1), SHAPE])
def test_log_prob_matches_torch_distributions(std_shape):
    mean, value = noise(*SHAPE), noise(*SHAPE, seed=1)
    std = noise(*std_shape, seed=2).abs() + 0.1
    expected = Independent(Normal(mean, std.expand(SHAPE)), 3).log_prob(value)
    gaussian = Gaussian(mean, std)
    assert torch.allclose(gaussian.log_prob(value), expected, rtol=1e-12)
    assert torch.allclose(gaussian.log_prob_per_dim(value), expected / SIZE, rtol=1e-12)


@pytest.mark.parametrize("std_shape", [(), (3, 1, 1, 1), SHAPE])
def test_kl_matches_torch_distributions(std_shape):
    new = Gaussian(noise(*SHAPE), noise(*std_shape, seed=2).abs() + 0.1)
    ref = Gaussian(noise(*SHAPE, seed=3), noise(*std_shape, seed=4).abs() + 0.1)
    expected = kl_divergence(
        Independent(Normal(new.mean, new.std.expand(SHAPE)), 3),
        Independent(Normal(ref.mean, ref.std.expand(SHAPE)), 3),
    )
    assert torch.allclose(new.kl(ref), expected, rtol=1e-11)
    assert torch.allclose(new.kl_per_dim(ref), expected / SIZE, rtol=1e-11)


def test_kl_of_close_means_keeps_its_digits_in_float32():
    # Means 1e-5 apart: the divergence is 5e-11 per element, far below float32's 6e-8 beside 1/2.
    mean = torch.zeros(1, 100)
    kl = Gaussian(mean + 1e-5, torch.tensor(0.3)).kl_per_dim(Gaussian(mean, torch.tensor(0.3)))
    assert kl.item() == pytest.approx(1e-10 / (2 * 0.09), rel=1e-5)
    same = Gaussian(mean, torch.tensor(0.3))
    assert same.kl(same).item() == 0.0


def test_sample_is_mean_plus_std_noise_from_either_source():
    gaussian = Gaussian(noise(*SHAPE), torch.tensor(0.5, dtype=torch.float64))
    eps = noise(*SHAPE, seed=7)
    assert torch.equal(gaussian.sample(noise=eps), gaussian.mean + 0.5 * eps)
    drawn = gaussian.sample(torch.Generator().manual_seed(7))
    assert torch.equal(drawn, gaussian.mean + 0.5 * eps)


def test_sample_statistics():
    gaussian = Gaussian(torch.full((2, 200_000), 3.0), torch.tensor([[0.5], [2.0]]))
    rows = gaussian.sample(torch.Generator().manual_seed(0))
    for row, std in zip(rows, (0.5, 2.0), strict=True):
        assert abs(row.mean().item() - 3.0) < 5 * std / math.sqrt(200_000)
        assert abs(row.std().item() / std - 1) < 5 / math.sqrt(400_000)


def test_sample_never_uses_the_global_random_state():
    gaussian = Gaussian(torch.zeros(1, 2), torch.tensor(1.0))
    with pytest.raises(ValueError, match="neither a generator nor noise"):
        gaussian.sample()
    with pytest.raises(ValueError, match="a generator and noise; exactly one"):
        gaussian.sample(torch.Generator(), noise=torch.zeros(1, 2))
    state = torch.get_rng_state()
    gaussian.sample(torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_deterministic_step_has_a_sample_but_no_density():
    point = Gaussian(torch.ones(2, 3), torch.tensor(0.0), has_density=False)
    proper = Gaussian(torch.ones(2, 3), torch.tensor(1.0))
    assert torch.equal(point.sample(), torch.ones(2, 3))
    assert torch.equal(point.sample(noise=torch.randn(2, 3)), torch.ones(2, 3))
    for ask in (
        lambda: point.log_prob(torch.ones(2, 3)),
        lambda: point.log_prob_per_dim(torch.ones(2, 3)),
        lambda: point.kl(proper),
        lambda: proper.kl_per_dim(point),
    ):
        with pytest.raises(ValueError, match=r"deterministic step.*diffusion coefficient above 0"):
            ask()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_upcast_at_entry(dtype):
    mean, value = noise(2, 8).to(dtype), noise(2, 8, seed=1).to(dtype)
    gaussian = Gaussian(mean, torch.tensor(0.3, dtype=dtype))
    exact = Gaussian(mean.float(), torch.tensor(0.3, dtype=dtype).float())
    assert gaussian.mean.dtype == gaussian.std.dtype == torch.float32
    assert torch.equal(gaussian.log_prob(value), exact.log_prob(value.float()))
    assert torch.equal(gaussian.sample(noise=value), exact.sample(noise=value.float()))


def test_dtypes_float32_and_float64_are_kept():
    for dtype in (torch.float32, torch.float64):
        gaussian = Gaussian(torch.zeros(1, 2, dtype=dtype), torch.ones((), dtype=dtype))
        assert gaussian.log_prob(torch.zeros(1, 2, dtype=dtype)).dtype == dtype
        assert gaussian.sample(torch.Generator()).dtype == dtype


# --- diffusion coefficients -------------------------------------------------------------------


def test_flow_diffusion_formula_and_its_exception_at_pure_noise():
    sigma = torch.tensor([1.0, 1.0 - 5e-7, 0.9, 0.5], dtype=torch.float64)
    sigma_next = torch.tensor([0.96, 0.96, 0.8, 0.2], dtype=torch.float64)
    expected = [
        0.7 * math.sqrt(1 / 0.04),
        0.7 * math.sqrt((1 - 5e-7) / 0.04),
        0.7 * math.sqrt(0.9 / 0.1),
        0.7,
    ]
    g = FlowDiffusion()(sigma, sigma_next)
    assert torch.allclose(g, torch.tensor(expected, dtype=torch.float64), rtol=1e-12)


@given(eta=st.floats(0.01, 2.0), next_sigma=st.floats(0.0, 0.999))
def test_first_flow_step_injects_eta_however_short(eta, next_sigma):
    one, after = torch.ones((), dtype=torch.float64), torch.tensor(next_sigma, dtype=torch.float64)
    step = Transition(FlowDiffusion(eta))(one.reshape(1, 1), one.reshape(1, 1), one, after)
    assert step.std.item() == pytest.approx(eta, rel=1e-12)


def test_constant_and_zero_diffusion():
    sigma = torch.tensor([0.9, 0.4])
    assert torch.equal(DanceDiffusion()(sigma, sigma / 2), torch.full((2,), 0.3))
    assert torch.equal(OdeDiffusion()(sigma, sigma / 2), torch.zeros(2))
    for diffusion in (FlowDiffusion(), DanceDiffusion(), OdeDiffusion()):
        g = diffusion(sigma.bfloat16(), (sigma / 2).bfloat16())
        assert g.dtype == torch.float32 and g.shape == (2,)


def test_only_noise_has_a_density():
    assert FlowDiffusion().has_density and DanceDiffusion().has_density
    assert not FlowDiffusion(0.0).has_density and not DanceDiffusion(0.0).has_density
    assert not OdeDiffusion().has_density
    assert Transition(FlowDiffusion()).has_density
    assert not Transition(OdeDiffusion()).has_density


@pytest.mark.parametrize("kind", [FlowDiffusion, DanceDiffusion])
@pytest.mark.parametrize("eta", [-0.1, math.nan, math.inf])
def test_bad_noise_level_is_refused(kind, eta):
    with pytest.raises(ValueError, match="finite and >= 0"):
        kind(eta)


# --- transition -------------------------------------------------------------------------------


def flow_step_as_published(x, v, sigma, sigma_next, eta):
    """Flow-GRPO's own arrangement: coefficients of x and v, dt negative."""
    dt = sigma_next - sigma
    g = eta * math.sqrt(sigma / (1 - (sigma_next if sigma == 1 else sigma)))
    mean = x * (1 + g**2 * dt / (2 * sigma)) + v * (1 + g**2 * (1 - sigma) / (2 * sigma)) * dt
    return mean, g * math.sqrt(-dt)


def dance_step_as_published(x, v, sigma, sigma_next, eta):
    """DanceGRPO's own arrangement: predicted image, score, correction."""
    dt = sigma_next - sigma
    score = -(x - (1 - sigma) * (x - sigma * v)) / sigma**2
    return x + dt * v - 0.5 * eta**2 * score * dt, eta * math.sqrt(-dt)


@pytest.mark.parametrize(
    ("diffusion", "published"),
    [
        (FlowDiffusion(0.7), flow_step_as_published),
        (DanceDiffusion(0.3), dance_step_as_published),
    ],
)
def test_transition_equals_both_published_arrangements(diffusion, published):
    x, v = noise(*SHAPE), noise(*SHAPE, seed=1)
    for sigma, sigma_next in pairwise(make_sigmas(17).double()):
        step = Transition(diffusion)(x, v, sigma, sigma_next)
        mean, std = published(x, v, sigma.item(), sigma_next.item(), diffusion.eta)
        assert torch.allclose(step.mean, mean, rtol=1e-10, atol=1e-12)
        assert step.std.item() == pytest.approx(std, rel=1e-12)
        assert step.has_density


@given(sigma=st.floats(0.05, 0.99), share=st.floats(0.0, 0.95), eta=st.floats(0.0, 1.5))
def test_flow_mean_simplifies_below_pure_noise(sigma, share, eta):
    x, v = noise(2, 3), noise(2, 3, seed=1)
    at, after = torch.tensor([sigma, sigma * share], dtype=torch.float64)
    mean = Transition(FlowDiffusion(eta))(x, v, at, after).mean
    dt = after - at
    expected = x * (1 + eta**2 * dt / (2 * (1 - at))) + v * (1 + eta**2 / 2) * dt
    assert torch.allclose(mean, expected, rtol=1e-9, atol=1e-9)


def test_no_diffusion_is_the_euler_step():
    x, v = noise(*SHAPE), noise(*SHAPE, seed=1)
    sigma, sigma_next = torch.tensor([0.8, 0.6], dtype=torch.float64)
    step = Transition(OdeDiffusion())(x, v, sigma, sigma_next)
    assert torch.equal(step.mean, x - (sigma - sigma_next) * v)
    assert step.std.item() == 0 and not step.has_density


def test_per_sample_sigmas_equal_one_call_per_sample():
    x, v = noise(*SHAPE), noise(*SHAPE, seed=1)
    sigma = torch.tensor([1.0, 0.7, 0.3], dtype=torch.float64)
    sigma_next = torch.tensor([0.9, 0.5, 0.0], dtype=torch.float64)
    together = Transition(FlowDiffusion())(x, v, sigma, sigma_next)
    shaped = Transition(FlowDiffusion())(
        x, v, sigma.reshape(3, 1, 1, 1), sigma_next.reshape(3, 1, 1, 1)
    )
    assert together.std.shape == (3, 1, 1, 1)
    assert torch.equal(together.mean, shaped.mean) and torch.equal(together.std, shaped.std)
    for b in range(3):
        alone = Transition(FlowDiffusion())(x[b : b + 1], v[b : b + 1], sigma[b], sigma_next[b])
        assert torch.equal(together.mean[b : b + 1], alone.mean)
        assert torch.equal(together.std[b].squeeze(), alone.std)


def test_transition_computes_in_float32_for_a_bfloat16_network():
    x, v = noise(2, 64, dtype=torch.float32), noise(2, 64, seed=1).bfloat16()
    sigma, sigma_next = torch.tensor([0.7273, 0.6774])
    low = Transition(FlowDiffusion())(x, v, sigma, sigma_next)
    exact = Transition(FlowDiffusion())(x.double(), v.double(), sigma.double(), sigma_next.double())
    assert low.mean.dtype == torch.float32
    assert torch.allclose(low.mean.double(), exact.mean, atol=1e-6)
    assert predict_clean(x, v, sigma).dtype == predict_noise(x, v, sigma).dtype == torch.float32


def test_unbound_transition_assumes_a_density():
    x = torch.ones(1, 2)
    assert transition(x, x, torch.tensor(0.5), torch.tensor(0.4), torch.tensor(0.1)).has_density


@settings(max_examples=50)
@given(sigma=st.floats(0.0, 1.0))
def test_predictions_invert_the_straight_path(sigma):
    clean, pure_noise = noise(2, 5), noise(2, 5, seed=1)
    sigma_B = torch.full((2,), sigma, dtype=torch.float64)
    x, v = (1 - sigma) * clean + sigma * pure_noise, pure_noise - clean
    assert torch.allclose(predict_clean(x, v, sigma_B), clean, atol=1e-12)
    assert torch.allclose(predict_noise(x, v, sigma_B), pure_noise, atol=1e-12)


# --- Flow-CPS ---------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.9, 1.0])
def test_cps_remixes_predicted_image_and_noise(eta):
    """s = sigma_next sin(eta pi/2), mu = (1 - sigma_next) x0_hat + sqrt(sigma_next^2 - s^2) x1_hat.

    The predictions are those of the straight path that x and v lie on, so both are known here
    without the functions that find them.
    """
    clean, pure_noise = noise(*SHAPE), noise(*SHAPE, seed=1)
    v = pure_noise - clean
    for sigma, sigma_next in pairwise(make_sigmas(17).double()):
        s, after = sigma.item(), sigma_next.item()
        x = (1 - s) * clean + s * pure_noise
        step = CpsTransition(eta)(x, v, sigma, sigma_next)
        std = after * math.sin(eta * math.pi / 2)
        kept = math.sqrt(max(after**2 - std**2, 0.0))
        assert step.std.item() == pytest.approx(std, rel=1e-12, abs=1e-15)
        assert CpsTransition(eta).std(sigma, sigma_next).item() == step.std.item()
        assert torch.allclose(step.mean, (1 - after) * clean + kept * pure_noise, atol=1e-12)
        # What of the noise is kept and what is drawn anew have squares that sum to sigma_next^2.
        at_zero = CpsTransition(eta)(x - (1 - s) * clean, pure_noise, sigma, sigma_next)
        kept_found = (at_zero.mean / pure_noise)[0, 0, 0, 0].item()
        assert kept_found**2 + step.std.item() ** 2 == pytest.approx(after**2, abs=1e-12)


def test_cps_without_noise_is_the_euler_step():
    x, v = noise(*SHAPE), noise(*SHAPE, seed=1)
    sigma = torch.tensor([1.0, 0.7, 0.3], dtype=torch.float64)
    sigma_next = torch.tensor([0.9, 0.5, 0.0], dtype=torch.float64)
    step = CpsTransition(0.0)(x, v, sigma, sigma_next)
    euler = Transition(OdeDiffusion())(x, v, sigma, sigma_next)
    assert torch.allclose(step.mean, euler.mean, atol=1e-14)
    assert not step.has_density and not CpsTransition(0.0).has_density
    assert torch.equal(step.sample(), step.mean)
    assert CpsTransition(0.1).has_density and step.std.abs().max() == 0


def test_cps_ends_without_noise_and_computes_in_float32():
    x = noise(2, 8).bfloat16()
    one, end = torch.tensor(0.2, dtype=torch.bfloat16), torch.tensor(0.0, dtype=torch.bfloat16)
    last = CpsTransition(0.9)(x, x, one, end)
    assert last.std.item() == 0.0
    assert last.mean.dtype == last.std.dtype == torch.float32
    assert torch.allclose(last.mean, predict_clean(x, x, one))


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan, math.inf])
def test_a_cps_angle_outside_the_quarter_circle_is_refused(eta):
    with pytest.raises(ValueError, match=rf"eta is {eta}; .* eta in \[0, 1\]; try 0.9"):
        CpsTransition(eta)


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        (Transition(FlowDiffusion(0.7)), [0.7, 0.7 * math.sqrt(0.8 / 0.2 * 0.3)]),
        (Transition(DanceDiffusion(0.3)), [0.3 * math.sqrt(0.2), 0.3 * math.sqrt(0.3)]),
        (Transition(OdeDiffusion()), [0.0, 0.0]),
        (CpsTransition(0.5), [0.8 * math.sqrt(0.5), 0.5 * math.sqrt(0.5)]),
    ],
)
def test_the_std_of_a_kernel_is_that_of_its_steps(kernel, expected):
    sigma = torch.tensor([1.0, 0.8], dtype=torch.float64)
    sigma_next = torch.tensor([0.8, 0.5], dtype=torch.float64)
    std = kernel.std(sigma, sigma_next)
    assert std.tolist() == pytest.approx(expected, rel=1e-12)
    x = noise(2, 3)
    assert torch.equal(kernel(x, x, sigma, sigma_next).std[:, 0], std)


def test_the_kernel_of_a_choice():
    for choice in (FlowDiffusion(0.5), DanceDiffusion(0.2), OdeDiffusion()):
        assert kernel_of(choice) == Transition(choice)
        assert kernel_of(choice).has_density == choice.has_density
    assert kernel_of(CpsTransition(0.4)) == CpsTransition(0.4)
