# SPDX-License-Identifier: Apache-2.0
"""Temporal consistency against its closed form, element by element, and its limits."""

import pytest
import torch

from chunkgrpo.core.consistency import consistency
from chunkgrpo.core.sde import predict_clean
from closed_forms import drawn

SIGMA = torch.tensor([0.9, 0.8, 0.5, 0.3], dtype=torch.float64)


def test_in_plain_arithmetic():
    """Two pairs: the chunks of rows 0 and 2, and those of rows 1 and 3."""
    new, old = drawn(4, 2, 3), drawn(4, 2, 3, seed=1)
    found = consistency(new, old, SIGMA)
    assert found.shape == (2,) and found.dtype == torch.float64
    for q, (i, k) in enumerate(((0, 2), (1, 3))):
        total = 0.0
        for v_i, o_i, v_k, o_k in zip(
            *(t[row].flatten().tolist() for row in (i, k) for t in (new, old)), strict=True
        ):
            total += (SIGMA[i].item() * (v_i - o_i) - SIGMA[k].item() * (v_k - o_k)) ** 2
        assert found[q].item() == pytest.approx(total / 6, rel=1e-12)


def test_it_is_the_distance_of_clean_predictions_at_fixed_states():
    x, new, old = drawn(4, 5, seed=2), drawn(4, 5), drawn(4, 5, seed=1)
    after, before = predict_clean(x, new, SIGMA), predict_clean(x, old, SIGMA)
    apart = (after[2:] - after[:2]) - (before[2:] - before[:2])
    assert torch.allclose(consistency(new, old, SIGMA), apart.square().mean(1), rtol=1e-10)


def test_before_an_update_it_is_zero_and_so_is_its_gradient():
    old = drawn(4, 2, 3)
    new = old.clone().requires_grad_()
    loss = consistency(new, old, SIGMA)
    assert torch.equal(loss, torch.zeros(2, dtype=torch.float64))
    loss.sum().backward()
    assert torch.equal(new.grad, torch.zeros_like(old))


def test_predictions_that_move_together_cost_nothing():
    old, move = drawn(4, 6), drawn(2, 6, seed=1).repeat(2, 1)
    together = old + move / SIGMA[:, None]
    assert consistency(together, old, SIGMA).abs().max() < 1e-28
    apart = old + move / SIGMA[:, None] * torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])
    expected = (2 * move[:2]).square().mean(1)
    assert torch.allclose(consistency(apart, old, SIGMA), expected, rtol=1e-10)


def test_the_gradient_by_hand():
    """d/dv_i is 2 sigma_i (sigma_i d_i - sigma_k d_k) / D, and the negative of it for k."""
    old = drawn(4, 6, seed=1)
    new = drawn(4, 6).requires_grad_()
    consistency(new, old, SIGMA).sum().backward()
    moved = SIGMA[:, None] * (new.detach() - old)
    pull = 2 * (moved[:2] - moved[2:]) / 6
    expected = SIGMA[:, None] * torch.cat([pull, -pull])
    assert torch.allclose(new.grad, expected, rtol=1e-10)


def test_low_precision_is_lifted_before_arithmetic():
    new, old = drawn(4, 8).bfloat16(), drawn(4, 8, seed=1).bfloat16()
    found = consistency(new, old, SIGMA.bfloat16())
    assert found.dtype == torch.float32
    assert torch.equal(found, consistency(new.float(), old.float(), SIGMA.bfloat16().float()))
