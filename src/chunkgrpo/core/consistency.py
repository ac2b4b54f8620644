# SPDX-License-Identifier: Apache-2.0
"""Temporal consistency: what keeps neighbouring chunks together while each is optimised.

Axes: Q pairs of neighbouring chunks, D latent elements.
"""

from __future__ import annotations

from torch import Tensor

from .precision import at_least_float32, beside


def consistency(velocity: Tensor, old_velocity: Tensor, sigma: Tensor) -> Tensor:
    r"""How far an update has moved the clean predictions of two neighbouring chunks apart.

    .. math:: \frac1D \| (\hat x_0^k - \hat x_0^i) - (\hat x_0^{k,old} - \hat x_0^{i,old}) \|^2
              = \frac1D \| \sigma_i (v_i - v_i^{old}) - \sigma_k (v_k - v_k^{old}) \|^2

    with i < k the first steps of the two chunks. As :math:`\hat x_0 = x - \sigma v` at a fixed
    state, the prediction moves by -sigma times the change of the velocity. Zero, and so is its
    gradient, while the policy is the one that sampled.

    Args:
        velocity: v at the first steps of the earlier chunks, then of the later, [2Q, *latent].
        old_velocity: The sampling policy's at the same states, same shape.
        sigma: [2Q].

    Returns:
        [Q] >= 0, float32 or better.
    """
    change = at_least_float32(velocity) - at_least_float32(old_velocity)
    moved = (change * beside(at_least_float32(sigma), change)).flatten(1)
    early, late = moved.chunk(2)
    return (late - early).square().mean(1)
