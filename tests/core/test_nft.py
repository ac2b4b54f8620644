# SPDX-License-Identifier: Apache-2.0
"""DiffusionNFT's loss against plain arithmetic, autograd and its known limits."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chunkgrpo.core.forward_process import noisy
from chunkgrpo.core.nft import nft_pair_loss, optimality, shuffled_times
from chunkgrpo.core.sde import predict_clean
from closed_forms import drawn, seeded

# --- DiffusionNFT ------------------------------------------------------------------------------


@given(advantage=st.floats(-100, 100), clip=st.floats(0.1, 10))
def test_optimality_is_a_probability(advantage, clip):
    r = optimality(torch.tensor(advantage, dtype=torch.float64), clip).item()
    assert 0 <= r <= 1
    clamped = min(max(advantage, -clip), clip)
    assert r == pytest.approx(clamped / (2 * clip) + 0.5, abs=1e-12)


def test_optimality_at_its_marks():
    r = optimality(torch.tensor([-7.0, -5.0, -2.5, 0.0, 2.5, 5.0, 7.0]), 5.0)
    assert r.tolist() == [0, 0, 0.25, 0.5, 0.75, 1, 1]


def nft_by_hand(v, v_old, x0, x_t, sigma, r, b):
    """One pair, element by element, in Python floats."""
    total = 0.0
    plus = [b * n + (1 - b) * o for n, o in zip(v, v_old, strict=True)]
    minus = [(1 + b) * o - b * n for n, o in zip(v, v_old, strict=True)]
    for weight, u in ((r, plus), (1 - r, minus)):
        off = [x - sigma * w - c for x, w, c in zip(x_t, u, x0, strict=True)]
        scale = max(sum(map(abs, off)) / len(off), 1e-5)
        total += weight * sum(d * d / scale for d in off) / len(off)
    return total / b


@pytest.mark.parametrize("beta", [1.0, 0.1, 0.5, 2.0])
def test_the_nft_loss_in_plain_arithmetic(beta):
    v, v_old, x0, x_t = (drawn(5, 3, 2, seed=s) for s in range(4))
    sigma = torch.tensor([0.05, 0.3, 0.5, 0.9, 1.0], dtype=torch.float64)
    r = torch.tensor([0.0, 0.2, 0.5, 0.8, 1.0], dtype=torch.float64)
    loss = nft_pair_loss(v, v_old, x0, x_t, sigma, r, beta)
    for q in range(5):
        rows = [t[q].flatten().tolist() for t in (v, v_old, x0, x_t)]
        expected = nft_by_hand(*rows, sigma[q].item(), r[q].item(), beta)
        assert loss[q].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_the_nft_weights_and_the_old_velocity_are_constants(beta):
    v, v_old, x0, x_t = (drawn(4, 6, seed=s).requires_grad_() for s in range(4))
    sigma = torch.tensor([0.2, 0.5, 0.8, 1.0], dtype=torch.float64)
    r = torch.tensor([0.1, 0.4, 0.7, 1.0], dtype=torch.float64)
    nft_pair_loss(v, v_old, x0.detach(), x_t.detach(), sigma, r, beta).sum().backward()
    assert v_old.grad is None
    # By hand: d/dv of r |x - s v+ - x0|^2 / (D w+ b) is -2 s r (x - s v+ - x0) / (D w+).
    s = sigma[:, None]
    with torch.no_grad():
        plus = x_t - s * (beta * v + (1 - beta) * v_old) - x0
        minus = x_t - s * ((1 + beta) * v_old - beta * v) - x0
        w_plus, w_minus = plus.abs().mean(1, keepdim=True), minus.abs().mean(1, keepdim=True)
        expected = r[:, None] * plus / w_plus - (1 - r[:, None]) * minus / w_minus
        expected = -2 * s * expected / 6
    assert torch.allclose(v.grad, expected, rtol=1e-10, atol=1e-14)


def test_with_beta_one_a_wholly_good_sample_is_imitated():
    v, v_old, x0, x_t = (drawn(3, 6, seed=s) for s in range(4))
    sigma, ones = torch.full((3,), 0.6), torch.ones(3)
    loss = nft_pair_loss(v, v_old, x0, x_t, sigma, ones, 1.0)
    off = predict_clean(x_t, v, sigma) - x0
    expected = off.square().mean(1) / off.abs().mean(1)
    assert torch.allclose(loss, expected, rtol=1e-12)
    # The old velocity plays no part then, and a wholly bad one shows its mirror image.
    assert torch.equal(loss, nft_pair_loss(v, drawn(3, 6, seed=9), x0, x_t, sigma, ones, 1.0))
    mirrored = nft_pair_loss(2 * v_old - v, v_old, x0, x_t, sigma, 1 - ones, 1.0)
    assert torch.allclose(mirrored, loss, rtol=1e-12)


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_at_the_old_policy_the_gradient_follows_two_r_minus_one(beta):
    v_old, x0, x_t = (drawn(1, 6, seed=s) for s in range(3))
    sigma = torch.tensor([0.6])

    def gradient(r):
        v = v_old.clone().requires_grad_()
        nft_pair_loss(v, v_old, x0, x_t, sigma, torch.tensor([r]), beta).backward()
        return v.grad

    whole = gradient(1.0)
    assert whole.norm() > 0.01
    assert torch.allclose(gradient(0.0), -whole, rtol=1e-10)
    assert torch.allclose(gradient(0.75), 0.5 * whole, rtol=1e-10)
    assert gradient(0.5).abs().max() < 1e-15


def test_a_perfect_prediction_costs_nothing():
    x0, noise, sigma = drawn(2, 5), drawn(2, 5, seed=1), torch.tensor([0.3, 0.9])
    v = (noise - x0).requires_grad_()
    loss = nft_pair_loss(v, v.detach(), x0, noisy(x0, noise, sigma), sigma, torch.ones(2), 1.0)
    loss.sum().backward()
    assert loss.max() < 1e-9 and v.grad.abs().max() < 1e-5


# --- times -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_steps", "fraction", "expected"),
    [(10, 0.99, 9), (10, 1.0, 10), (10, 0.3, 3), (4, 0.1, 1), (25, 0.99, 24)],
)
def test_shuffled_times_are_a_part_of_a_permutation(num_steps, fraction, expected):
    times = shuffled_times(num_steps, fraction, 40, seeded())
    assert times.shape == (40, expected)
    for row in times.tolist():
        assert len(set(row)) == expected and set(row) <= set(range(num_steps))
    # All times, pure noise included, and samples differ.
    assert times.unique().tolist() == list(range(num_steps))
    assert len({tuple(row) for row in times.tolist()}) > 1


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.01, math.nan])
def test_a_fraction_outside_its_range_is_refused(fraction):
    with pytest.raises(ValueError, match=r"trained share of the times must lie in \(0, 1\]"):
        shuffled_times(10, fraction, 2, seeded())
