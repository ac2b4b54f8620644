# SPDX-License-Identifier: Apache-2.0
r"""Objectives on the forward process: noise a finished image again and ask for its velocity.

Chunk-GRPO needs the density of every step it trains. The methods here need only the clean latents
of a rollout, whichever solver made them: a latent is noised to a random time of the schedule, and
the loss compares the velocity there with the one that leads back. DiffusionNFT contrasts two
velocities around the old policy's; AWM reads a log-probability off the pretraining loss and puts
it into the clipped surrogate of :mod:`.objectives`.

Axes: B samples, T times per sample, K sampler steps, Q (sample, time) pairs, D latent elements.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Generator, Tensor

from .chunks import num_selected
from .precision import at_least_float32
from .sde import predict_clean

PseudoLogProb = Callable[[Tensor, Tensor], Tensor]
"""(matching error [Q], sigma [Q]) -> pseudo-log-probability [Q]."""

# Keeps the self-normalised loss finite where a prediction is perfect.
SMALLEST_DISTANCE = 1e-5

# Keeps the slope of a root finite where the error is 0.
SMALLEST_ERROR = 1e-10


def _beside(values: Tensor, x: Tensor) -> Tensor:
    """[Q] -> [Q, 1, ...], so that it broadcasts over the latent axes of ``x``."""
    values = at_least_float32(values)
    return values.reshape(*values.shape, *[1] * (x.ndim - values.ndim))


def _mean_per_pair(x: Tensor) -> Tensor:
    """[Q, *latent] -> [Q]."""
    return x.flatten(1).mean(1)


# ---------------------------------------------------------------------------------------------
# The forward process


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
    sigma = _beside(sigma, clean)
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
    return _mean_per_pair((at_least_float32(velocity) - at_least_float32(other)).square())


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


# ---------------------------------------------------------------------------------------------
# DiffusionNFT


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
    distance = _mean_per_pair(difference.detach().abs()).clamp(min=SMALLEST_DISTANCE)
    return _mean_per_pair(difference.square()) / distance


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


# ---------------------------------------------------------------------------------------------
# AWM


def scaled_advantages(advantages: Tensor, clip: float, maximum: float) -> Tensor:
    r"""Clamp advantages, then stretch the range they are left with.

    .. math:: A' = \frac{m}{c}\,\mathrm{clip}(A, -c, c)

    Args:
        advantages: A, any shape.
        clip: c > 0; 5 in the published runs.
        maximum: m > 0, the largest result; 1 in the published runs.

    Returns:
        In [-m, m], shape of ``advantages``, float32 or better.

    Reference: AWM, arXiv:2509.25050, published code.
    """
    return at_least_float32(advantages).clamp(-clip, clip) * (maximum / clip)


def uniform_log_prob(error: Tensor, sigma: Tensor) -> Tensor:
    r"""The negative matching error: all times alike.

    .. math:: \ell = -e

    Args:
        error: e, :func:`matching_error`, [Q] >= 0.
        sigma: [Q]; read for its shape's sake only.

    Returns:
        [Q] <= 0.

    Reference: AWM, arXiv:2509.25050.
    """
    return -error


def linear_log_prob(error: Tensor, sigma: Tensor) -> Tensor:
    r"""The negative matching error, weighted by the noise level.

    .. math:: \ell = -\sigma\,e

    Args:
        error: e, :func:`matching_error`, [Q] >= 0.
        sigma: [Q] in [0, 1].

    Returns:
        [Q] <= 0.

    Reference: AWM, arXiv:2509.25050.
    """
    return -sigma * error


def quadratic_log_prob(error: Tensor, sigma: Tensor) -> Tensor:
    r"""The negative error of the predicted clean latent.

    .. math:: \ell = -\sigma^2 e = -\tfrac1D \|\hat x_0 - x_0\|^2

    Args:
        error: e, :func:`matching_error`, [Q] >= 0.
        sigma: [Q] in [0, 1].

    Returns:
        [Q] <= 0.

    Reference: AWM, arXiv:2509.25050.
    """
    return -sigma.square() * error


def huber_log_prob(error: Tensor, sigma: Tensor) -> Tensor:
    r"""A distance in place of a squared one: large errors pull no harder than small ones.

    .. math:: \ell = -\sigma\,(\sqrt{e + 10^{-10}} - 10^{-5})

    Args:
        error: e, :func:`matching_error`, [Q] >= 0.
        sigma: [Q] in [0, 1].

    Returns:
        [Q] <= 0; 0 up to rounding where the error is 0.

    Reference: AWM, arXiv:2509.25050, published code.
    """
    return -sigma * ((error + SMALLEST_ERROR).sqrt() - SMALLEST_ERROR**0.5)


def ghuber_log_prob(error: Tensor, sigma: Tensor, power: float = 0.25) -> Tensor:
    r"""A power of the matching error, from :func:`linear_log_prob` (p = 1) to flatter.

    .. math:: \ell = -\frac{\sigma}{p} \left[(e + 10^{-10})^p - 10^{-10 p}\right]

    Its slope is that of :func:`linear_log_prob` times e^(p-1): the smaller p, the more a pair
    that is already well matched counts. p = 1/2 is twice :func:`huber_log_prob`.

    Args:
        error: e, :func:`matching_error`, [Q] >= 0.
        sigma: [Q] in [0, 1].
        power: p > 0.

    Returns:
        [Q] <= 0; 0 up to rounding where the error is 0.

    Reference: AWM, arXiv:2509.25050, published code, where it is the default with p = 0.25.
    """
    return -sigma / power * ((error + SMALLEST_ERROR) ** power - SMALLEST_ERROR**power)


PSEUDO_LOG_PROBS: dict[str, PseudoLogProb] = {
    "uniform": uniform_log_prob,
    "t": linear_log_prob,
    "t2": quadratic_log_prob,
    "huber": huber_log_prob,
    "ghuber": ghuber_log_prob,
}
"""Pseudo-log-probabilities by the name a configuration uses."""


def pseudo_log_prob(name: str, power: float = 0.25) -> PseudoLogProb:
    """Look up a pseudo-log-probability.

    Args:
        name: One of ``PSEUDO_LOG_PROBS``.
        power: p > 0 of ``"ghuber"``; the others have none.

    Returns:
        (matching error [Q], sigma [Q]) -> [Q].

    Raises:
        ValueError: If the name is unknown or the power not positive.
    """
    if name not in PSEUDO_LOG_PROBS:
        known = ", ".join(PSEUDO_LOG_PROBS)
        raise ValueError(f"unknown pseudo-log-probability {name!r}; known: {known}")
    if not power > 0:
        raise ValueError(f"power is {power}; it must be positive; 0.25 in the published runs")
    if name == "ghuber":
        return partial(ghuber_log_prob, power=power)
    return PSEUDO_LOG_PROBS[name]


# ---------------------------------------------------------------------------------------------
# Which times are trained


def stratified_times(
    num_steps: int, num_times: int, num_samples: int, generator: Generator
) -> Tensor:
    r"""A few times of the schedule per sample, spread over all of it but the first.

    .. math:: i_k \sim U\{\,b_k, \dots, b_{k+1} - 1\,\}, \qquad
              b_k = 1 + \lfloor k (K - 1) / T \rfloor

    One time from each of T nearly equal strata, each sample on its own, so no time repeats
    within a sample. The first step is pure noise and left out. Where T does not divide K - 1,
    strata differ by one step, and a time of a smaller one is drawn a little more often.

    Args:
        num_steps: K >= 2.
        num_times: T in [1, K - 1]; 6 in the published runs.
        num_samples: B.
        generator: On the CPU.

    Returns:
        Indices into the schedule, [B, T] int64 on the CPU, in [1, K - 1], each row increasing.

    Raises:
        ValueError: If the schedule has too few steps for ``num_times``.

    Reference: AWM, arXiv:2509.25050, published code.
    """
    num_choices = num_steps - 1
    if not 1 <= num_times <= num_choices:
        raise ValueError(
            f"num_times is {num_times}; a schedule of {num_steps} steps offers 1 to {num_choices} "
            "times, as the first is never trained; lower num_times or raise num_steps"
        )
    edges = torch.tensor([1 + k * num_choices // num_times for k in range(num_times + 1)])
    uniform = torch.rand(num_samples, num_times, generator=generator, dtype=torch.float64)
    return edges[:-1] + (uniform * edges.diff()).long()


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
