# SPDX-License-Identifier: Apache-2.0
"""DiffusionNFT (arXiv:2509.16117): two velocities around the old policy's, contrasted.

Axes: B samples, T times per sample, K sampler steps, Q (sample, time) pairs, D latent elements.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from .forward_process import mean_per_pair
from .precision import at_least_float32
from .sde import predict_clean
from .selection import num_selected

# Keeps the self-normalised loss finite where a prediction is perfect.
SMALLEST_DISTANCE = 1e-5


def optimality(advantages: Tensor, clip: float) -> Tensor:
    r"""The probability that a sample counts as a good one.

    .. math:: r = \mathrm{clip}\!\left(\frac{A}{2c} + \frac12,\; 0,\; 1\right)

    1/2 at advantage 0; 1 from c upwards and 0 from -c downwards.

    Args:
        advantages: A, any shape.
        clip: c > 0; 5 in the published runs.

    Returns:
        In [0, 1], shape of ``advantages``, float32 or better.

    Reference: DiffusionNFT, arXiv:2509.16117.
    """
    return (at_least_float32(advantages) / (2 * clip) + 0.5).clamp(0, 1)


def _normalised_error(predicted: Tensor, clean: Tensor) -> Tensor:
    """Mean squared error over mean absolute error; the latter is a constant to the gradient."""
    difference = predicted - at_least_float32(clean)
    distance = mean_per_pair(difference.detach().abs()).clamp(min=SMALLEST_DISTANCE)
    return mean_per_pair(difference.square()) / distance


def nft_pair_loss(
    velocity: Tensor,
    old_velocity: Tensor,
    clean: Tensor,
    noised: Tensor,
    sigma: Tensor,
    optimality: Tensor,
    beta: float,
) -> Tensor:
    r"""Towards what good samples show and, mirrored at the old policy, away from bad ones.

    .. math::
        v^+ &= b\,v + (1-b)\,v_{old}, \qquad v^- = (1+b)\,v_{old} - b\,v, \\
        \hat x^\pm &= x_\sigma - \sigma v^\pm, \qquad
        w^\pm = \max\bigl(\tfrac1D\|\hat x^\pm - x_0\|_1,\; 10^{-5}\bigr), \\
        L &= \frac1b \left[ r\,\frac{\|\hat x^+ - x_0\|^2}{D\,w^+}
             + (1-r)\,\frac{\|\hat x^- - x_0\|^2}{D\,w^-} \right]

    Gradients flow through v alone: v_old and both w are constants. With b = 1, v^+ is v itself
    and v^- its mirror image. At v = v_old the gradient is 2r - 1 times that of imitating the
    sample, so r = 1/2 pulls nowhere there.

    Args:
        velocity: v at ``noised``, [Q, *latent], with gradient.
        old_velocity: v_old at ``noised``, same shape.
        clean: x_0, same shape.
        noised: x_sigma, same shape.
        sigma: [Q] in [0, 1].
        optimality: r, [Q] in [0, 1].
        beta: b > 0, how far the two velocities stand from the old one; 1 or 0.1 published.

    Returns:
        [Q] >= 0, float32 or better.

    Reference: DiffusionNFT, arXiv:2509.16117; the published objective is this times the clip of
    its advantages (5), averaged.
    """
    new, old = at_least_float32(velocity), at_least_float32(old_velocity).detach()
    towards = predict_clean(noised, beta * new + (1 - beta) * old, sigma)
    away = predict_clean(noised, (1 + beta) * old - beta * new, sigma)
    good = optimality * _normalised_error(towards, clean)
    bad = (1 - optimality) * _normalised_error(away, clean)
    return (good + bad) / beta


def shuffled_times(
    num_steps: int, fraction: float, num_samples: int, generator: Generator
) -> Tensor:
    r"""The times of the solver in random order, and of those the first part.

    .. math:: T = \max(1, \lfloor K f \rfloor)

    Every sample has its own order. Pure noise is among the times.

    Args:
        num_steps: K >= 1.
        fraction: f in (0, 1]; 0.99 in the published runs, which leaves out one of 10.
        num_samples: B.
        generator: On the CPU.

    Returns:
        Indices into the schedule, [B, T] int64 on the CPU, in [0, K - 1], distinct in each row.

    Raises:
        ValueError: If ``fraction`` is outside (0, 1].

    Reference: DiffusionNFT, arXiv:2509.16117, published code.
    """
    if not 0 < fraction <= 1:
        raise ValueError(
            f"fraction is {fraction}; the trained share of the times must lie in (0, 1]; "
            "1.0 trains them all"
        )
    num_times = num_selected(num_steps, fraction)
    orders = [torch.randperm(num_steps, generator=generator) for _ in range(num_samples)]
    return torch.stack(orders)[:, :num_times]
