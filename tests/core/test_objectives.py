# SPDX-License-Identifier: Apache-2.0
"""The surrogate and its pieces against autograd, closed forms and torch.distributions."""

import math

import pytest
import torch
from chunkgrpo.core.objectives import (
    INNER_WEIGHTS,
    OUTER_WEIGHTS,
    PLAN_WEIGHTS,
    Clip,
    KlMask,
    NoTrustRegion,
    chunk_log_ratio,
    chunk_size_weights,
    clipped_surrogate,
    equal_kappa_weights,
    gradient_is_cut,
    implicit_weights,
    inverse_dt_weights,
    k3_kl,
    k3_slope,
    noise_level_weights,
    policy_gradient_scale,
    ratio_diagnostics,
    ratio_scale,
    reference_kl,
    region_slope,
    step_coefficients,
    surrogate_slope,
    transition_scale,
)  # FIXME OUTER_WEIGHTS
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from chunkgrpo.core.plans import ChunkPlan, paper_plan, step_plan, whole_plan
from chunkgrpo.core.schedules import make_sigmas
from chunkgrpo.core.sde import (
    CpsTransition,
    DanceDiffusion,
    FlowDiffusion,
    Gaussian,
    OdeDiffusion,
    Transition,
)

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


# --- trust regions ----------------------------------------------------------------------------

REGIONS = [Clip(0.1, 0.3), KlMask(0.02), NoTrustRegion()]


@pytest.mark.parametrize("region", REGIONS, ids=str)
def test_the_slope_of_every_region_is_the_difference_quotient_of_its_loss(region):
    """dL/d log s = -A s, 0 where cut; a cut loss is flat."""
    r, h = torch.linspace(-0.8, 0.8, 41, dtype=torch.float64)[:, None] + 0.003, 1e-6
    for advantage in (1.7, -0.6, 0.0):
        for divergence in (0.0, 0.019, 0.02, 0.5):
            a, d = torch.full((41,), advantage, dtype=torch.float64), torch.full_like(r, divergence)
            quotient = (region.value(r + h, a, d) - region.value(r - h, a, d)) / (2 * h)
            slope = region_slope(region, r, a, d)
            assert torch.allclose(slope, quotient, rtol=1e-7, atol=1e-8)
            cut = region.is_cut(r, a, d)
            assert cut.dtype == torch.bool and cut.shape == r.shape
            assert torch.equal(slope == 0, cut | (a[:, None] == 0))


def test_a_clip_is_the_surrogate_with_its_range():
    r, a, d = tensor(-0.2, 0.05, 0.4)[None], tensor(2.0), tensor(9.0)
    region = Clip(0.1, 0.3)
    assert torch.equal(region.value(r, a, d), clipped_surrogate(r, a, 0.1, 0.3))
    assert torch.equal(region.is_cut(r, a, d), gradient_is_cut(r, a, 0.1, 0.3))
    assert torch.equal(region_slope(region, r, a, d), surrogate_slope(r, a, 0.1, 0.3))
    assert (Clip().low, Clip().high, Clip.needs_divergence) == (5e-5, 5e-5, False)


def test_a_mask_drops_what_has_left_and_still_moves_the_rewarded_way():
    #           rewarded way  wrong way  too near  at the edge  not rewarded  punished, less likely
    r = tensor(0.5, -0.5, 0.5, 0.5, 0.5, -0.5)[:, None]
    a = tensor(2.0, 2.0, 2.0, 2.0, 0.0, -2.0)
    d = tensor(0.3, 0.3, 0.01, 0.02, 0.3, 0.3)[:, None]
    dropped = [True, False, False, True, False, True]
    region = KlMask(0.02)
    assert region.is_cut(r, a, d)[:, 0].tolist() == dropped
    plain = [0.0 if gone else -x * math.exp(y) for gone, x, y in zip(dropped, a, r, strict=True)]
    assert region.value(r, a, d)[:, 0].tolist() == pytest.approx([float(each) for each in plain])
    # The ratio is no matter: this one would be far outside any clip.
    assert region.value(tensor(3.0)[None], tensor(1.0), tensor(0.0)[None]).item() < -20
    assert KlMask.needs_divergence


@pytest.mark.parametrize("threshold", [0.0, -1.0, math.nan])
def test_a_mask_that_would_drop_everything_is_refused(threshold):
    with pytest.raises(ValueError, match=f"KL threshold is {threshold}; it must be above 0; try"):
        KlMask(threshold)


def test_no_trust_region_is_the_importance_weighted_reward():
    r, a = tensor(-2.0, 0.0, 2.0)[None], tensor(3.0)
    region = NoTrustRegion()
    expected = [[-3 * math.exp(-2), -3.0, -3 * math.exp(2)]]
    assert region.value(r, a, r * 0).tolist()[0] == pytest.approx(expected[0])
    assert not region.is_cut(r, a, r * 0).any() and not region.needs_divergence


@pytest.mark.parametrize("region", REGIONS, ids=str)
def test_regions_take_advantages_by_sample_or_by_chunk(region):
    r = torch.linspace(-0.5, 0.5, 6, dtype=torch.float64).reshape(2, 3)
    a, d = tensor(1.0, -2.0), torch.full((2, 3), 0.05, dtype=torch.float64)
    repeated = a[:, None].expand(2, 3)
    assert torch.equal(region.value(r, a, d), region.value(r, repeated, d))
    assert torch.equal(region_slope(region, r, a, d), region_slope(region, r, repeated, d))


@given(st.floats(-5.0, 5.0))
def test_k3_slope_is_the_difference_quotient(r):
    h = 1e-5
    quotient = (k3_kl(tensor(r + h)) - k3_kl(tensor(r - h))) / (2 * h)
    assert k3_slope(tensor(r)).item() == pytest.approx(quotient.item(), rel=1e-6, abs=1e-8)
    assert k3_slope(tensor(0.0)).item() == 0.0


# --- scales and weights of steps --------------------------------------------------------------


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


def test_weights_of_steps_by_hand():
    # 1/kappa = 4, 2, 1; their mean 7/3.
    assert equal_kappa_weights(tensor(0.25, 0.5, 1.0)).tolist() == pytest.approx(
        [12 / 7, 6 / 7, 3 / 7], rel=1e-12
    )
    assert noise_level_weights(tensor(0.1, 0.2, 0.6)).tolist() == pytest.approx([1 / 3, 2 / 3, 2.0])
    assert inverse_dt_weights(tensor(0.5, 0.1)).tolist() == pytest.approx([2.0, 10.0])
    for weigh in (equal_kappa_weights, noise_level_weights, inverse_dt_weights):
        assert weigh(torch.tensor([0.5, 0.25]).bfloat16()).dtype == torch.float32


def test_weights_by_the_name_a_configuration_uses():
    std, dt, kappa = tensor(0.1, 0.3), tensor(0.2, 0.4), tensor(0.5, 1.0)
    assert torch.equal(INNER_WEIGHTS["none"](kappa), torch.ones(2).double())
    assert torch.equal(INNER_WEIGHTS["equal_kappa"](kappa), equal_kappa_weights(kappa))
    assert torch.equal(OUTER_WEIGHTS["none"](std, dt), torch.ones(2).double())
    assert torch.equal(OUTER_WEIGHTS["noise_level"](std, dt), noise_level_weights(std))
    assert torch.equal(OUTER_WEIGHTS["inverse_dt"](std, dt), inverse_dt_weights(dt))


def test_weights_of_a_cut_by_hand():
    """Seven steps in chunks of 1, 2 and 4: C cs / N, and its inverse."""
    plan = ChunkPlan((1, 2, 4))
    sizes, implicit = chunk_size_weights(plan), implicit_weights(plan)
    assert sizes.tolist() == pytest.approx([3 / 7] + [6 / 7] * 2 + [12 / 7] * 4)
    assert implicit.tolist() == pytest.approx([7 / 3] + [7 / 6] * 2 + [7 / 12] * 4)
    # Mean 1: the first over chunks, the second over steps.
    assert plan.reduce(sizes).mean().item() == pytest.approx(1)
    assert implicit.mean().item() == pytest.approx(1)
    assert PLAN_WEIGHTS["chunk_size"](plan).equal(sizes)
    assert PLAN_WEIGHTS["implicit"](plan).equal(implicit)
    for equal in (ChunkPlan((1,) * 6), ChunkPlan((3, 3)), ChunkPlan((6,))):
        assert torch.equal(chunk_size_weights(equal), torch.ones(6))
        assert torch.equal(implicit_weights(equal), torch.ones(6))


def test_chunk_size_weights_give_every_step_the_coefficient_1_over_n():
    plan = ChunkPlan((1, 2, 4))
    slope_BC = plan.reduce(chunk_size_weights(plan)[None])
    mask_BC = torch.ones(1, 3, dtype=torch.bool)
    coefficients = step_coefficients(mask_BC, slope_BC, plan, 3)
    torch.testing.assert_close(coefficients, torch.full((1, 7), 1 / 7))
    # Without them a step of the chunk of four counts a quarter of the first step.
    plain = step_coefficients(mask_BC, torch.ones(1, 3), plan, 3)[0]
    assert (plain[0] / plain[3:]).tolist() == pytest.approx([4.0] * 4)


def test_equal_kappa_weights_do_equalise():
    """Weighted, the gradient of every step's log-density w.r.t. the velocity has one spread."""
    sigmas = make_sigmas(9).double()[:-1]
    kernel = Transition(FlowDiffusion(0.7))
    weights = equal_kappa_weights(transition_scale(kernel, sigmas))
    eps = torch.randn(1, 4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spreads = []
    for weight, sigma, after in zip(weights, sigmas, sigmas[1:], strict=False):
        v = torch.zeros(1, 4000, dtype=torch.float64, requires_grad=True)
        step = kernel(torch.ones_like(v), v, sigma, after)
        value = step.sample(noise=eps).detach()
        (grad,) = torch.autograd.grad(step.log_prob(value).sum(), v)
        spreads.append((weight * grad.std()).item())
    assert spreads == pytest.approx([spreads[0]] * 8, rel=1e-9)


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
