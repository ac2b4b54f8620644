# SPDX-License-Identifier: Apache-2.0
"""The forward process: a finished image, noised again, and how well a velocity leads back.

Objectives on the forward process need only the clean latents of a rollout, whichever solver made
them: a latent is noised to a random time of the schedule, and the loss compares the velocity there
with the one that leads back.

Axes: Q (sample, time) pairs, D latent elements.
"""

from __future__ import annotations

from torch import Tensor

from .precision import at_least_float32, beside


def mean_per_pair(x: Tensor) -> Tensor:
    """[Q, *latent] -> [Q]."""
    return x.flatten(1).mean(1)


def noisy(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    r"""A clean latent, noised to a given level.

    .. math:: x_\sigma = (1 - \sigma)\, x_0 + \sigma\, \epsilon

    Args:
        clean: x_0, [Q, *latent].
        noise: Standard normal, same shape.
        sigma: 0-dim or [Q], in [0, 1]. 0 returns ``clean`` and 1 returns ``noise``.

    Returns:
        [Q, *latent], float32 or better.

    Reference: Lipman et al., arXiv:2210.02747, optimal transport path.
    """
    sigma = beside(at_least_float32(sigma), clean)
    return (1 - sigma) * at_least_float32(clean) + sigma * at_least_float32(noise)


def velocity_distance(velocity: Tensor, other: Tensor) -> Tensor:
    r"""Mean squared difference of two velocities, per latent element.

    .. math:: \frac1D \sum_d (v_d - u_d)^2

    Against a frozen model's velocity it is the penalty that keeps a policy near that model.

    Args:
        velocity: v, [Q, *latent].
        other: u, same shape.

    Returns:
        [Q] >= 0, float32 or better.

    Reference: DiffusionNFT, arXiv:2509.16117; AWM, arXiv:2509.25050.
    """
    return mean_per_pair((at_least_float32(velocity) - at_least_float32(other)).square())


def matching_error(velocity: Tensor, clean: Tensor, noise: Tensor) -> Tensor:
    r"""The loss of pretraining: how far a velocity is from the pair's own.

    .. math:: e = \frac1D \sum_d (v_d - (\epsilon_d - x_{0,d}))^2

    Args:
        velocity: Predicted at ``noisy(clean, noise, sigma)``, [Q, *latent].
        clean: x_0, same shape.
        noise: The very noise of the prediction's input, same shape.

    Returns:
        [Q] >= 0, float32 or better.

    Reference: Lipman et al., arXiv:2210.02747, conditional flow matching.
    """
    return velocity_distance(velocity, at_least_float32(noise) - at_least_float32(clean))
