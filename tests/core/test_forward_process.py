# SPDX-License-Identifier: Apache-2.0
"""Noising and matching errors in plain arithmetic."""

import pytest
import torch

from chunkgrpo.core.forward_process import matching_error, noisy, velocity_distance
from chunkgrpo.core.sde import predict_clean
from closed_forms import drawn


def test_noising_in_plain_arithmetic():
    clean, noise, sigma = drawn(3, 2, 4), drawn(3, 2, 4, seed=1), torch.tensor([0.0, 0.25, 1.0])
    noised = noisy(clean, noise, sigma)
    assert torch.equal(noised[0], clean[0]) and torch.equal(noised[2], noise[2])
    for i in range(2):
        for j in range(4):
            expected = 0.75 * clean[1, i, j].item() + 0.25 * noise[1, i, j].item()
            assert noised[1, i, j].item() == pytest.approx(expected, rel=1e-12)
    assert torch.equal(noisy(clean, noise, torch.tensor(0.25))[1], noised[1])


def test_the_pairs_own_velocity_leads_back_and_has_no_error():
    clean, noise = drawn(4, 6), drawn(4, 6, seed=1)
    sigma = torch.tensor([0.1, 0.4, 0.7, 1.0], dtype=torch.float64)
    velocity = noise - clean
    back = predict_clean(noisy(clean, noise, sigma), velocity, sigma)
    assert torch.allclose(back, clean, atol=1e-12)
    assert torch.equal(matching_error(velocity, clean, noise), torch.zeros(4, dtype=torch.float64))


def test_errors_are_means_over_elements_of_each_pair():
    velocity, clean, noise = drawn(3, 2, 5), drawn(3, 2, 5, seed=1), drawn(3, 2, 5, seed=2)
    error, distance = matching_error(velocity, clean, noise), velocity_distance(velocity, clean)
    for q in range(3):
        squares = [
            (v - (e - x)) ** 2
            for v, x, e in zip(
                velocity[q].flatten().tolist(),
                clean[q].flatten().tolist(),
                noise[q].flatten().tolist(),
                strict=True,
            )
        ]
        assert error[q].item() == pytest.approx(sum(squares) / 10, rel=1e-12)
        expected = (velocity[q] - clean[q]).pow(2).sum().item() / 10
        assert distance[q].item() == pytest.approx(expected, rel=1e-12)


def test_low_precision_is_lifted_before_arithmetic():
    clean, noise = drawn(2, 8).bfloat16(), drawn(2, 8, seed=1).bfloat16()
    sigma = torch.tensor([0.3, 0.979])
    expected = noisy(clean.float(), noise.float(), sigma)
    assert torch.equal(noisy(clean, noise, sigma), expected)
    assert expected.dtype == torch.float32
    error = matching_error(noise, clean, noise)
    assert torch.equal(error, matching_error(noise.float(), clean.float(), noise.float()))
    assert error.dtype == torch.float32
