# SPDX-License-Identifier: Apache-2.0
"""The surrogate and its relatives against plain arithmetic, autograd and difference quotients."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chunkgrpo.core.trust import (
    Clip,
    KlMask,
    NoTrustRegion,
    clipped_surrogate,
    gradient_is_cut,
    region_slope,
    surrogate_slope,
)
from closed_forms import tensor

log_ratios = st.floats(-2.0, 2.0)

signed = st.floats(-3.0, 3.0)

clips = st.floats(0.0, 0.9)


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


# --- trust regions -----------------------------------------------------------------------------

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
            assert torch.equal(region.slope(r, a, d), slope)
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


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 0.1), (-0.1, 0.1), (1.1, 0.1), (0.1, 0.0), (math.nan, 0.1)]
)
def test_a_clip_range_on_one_side_of_1_is_refused(low, high):
    with pytest.raises(ValueError, match=f"range is {low} below and {high} above 1; low must be"):
        Clip(low, high)


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
