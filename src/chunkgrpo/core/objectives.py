# SPDX-License-Identifier: Apache-2.0
r"""The clipped surrogate on chunks, its exact gradient in pieces, KL terms and diagnostics.

Per-dimension log-probabilities :math:`\ell_i` of the N trained steps become one log-ratio per
chunk; the surrogate of that ratio is the loss. Because a chunk's loss depends on its steps only
through that one number, its gradient splits into one term per step with a scalar coefficient
(:func:`step_coefficients`), which can be back-propagated one at a time: memory stays flat.

Axes: B samples, N trained steps, K sampler steps, C chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .chunks import ChunkPlan
from .precision import at_least_float32
from .sde import Diffusion, Gaussian


def chunk_log_ratio(new_BN: Tensor, old_BN: Tensor, plan: ChunkPlan) -> Tensor:
    r"""Log of the importance ratio of each chunk: the mean over its steps.

    .. math:: \log s_j = \frac{1}{cs_j} \sum_{i \in ch_j} (\ell_i^{new} - \ell_i^{old})

    The geometric mean of the steps' ratios. As the :math:`\ell_i` are per latent element, it is
    the density ratio of the paper to the power 1/D. Chunks of one give the step ratio to the last
    bit; one chunk of all steps gives the sequence-level ratio.

    Args:
        new_BN: Log-probabilities per dimension under the policy being trained, [B, N].
        old_BN: The same under the policy that sampled, [B, N]; carries no gradient.
        plan: Partition of the N steps.

    Returns:
        [B, C], 0 where the policy has not moved.

    Raises:
        ValueError: If the plan does not cover N steps.

    Reference: Chunk-GRPO, arXiv:2510.21583, eq. 15.
    """
    return plan.reduce(new_BN - old_BN)


def _beside(advantages: Tensor, log_ratio: Tensor) -> Tensor:
    """[B] -> [B, 1, ...]; plain broadcasting would align it with the chunks instead."""
    return advantages.reshape(*advantages.shape, *[1] * (log_ratio.ndim - advantages.ndim))


def clipped_surrogate(
    log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    r"""PPO's pessimistic surrogate, as a loss per ratio.

    .. math:: L = \max(-A s,\; -A\,\mathrm{clip}(s, 1 - \epsilon_{low}, 1 + \epsilon_{high})),
              \qquad s = e^{\text{log ratio}}

    Args:
        log_ratio: [B, C] (or any shape that begins with B).
        advantages: [B], or the shape of ``log_ratio`` where credit differs by chunk.
        clip_low: In [0, 1]; 5e-5 in the published runs, which needs ratios per dimension.
        clip_high: >= 0.

    Returns:
        Shape of ``log_ratio``; minimising it improves the policy.

    Reference: Chunk-GRPO, arXiv:2510.21583, eq. 14; PPO, arXiv:1707.06347, eq. 7.
    """
    advantages = _beside(advantages, log_ratio)
    ratio = log_ratio.exp()
    return torch.maximum(
        -advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    )


def gradient_is_cut(
    log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    r"""Where the clip stops the gradient: the ratio has already moved far enough the right way.

    .. math:: (A > 0 \wedge s > 1 + \epsilon_{high}) \vee (A < 0 \wedge s < 1 - \epsilon_{low})

    A ratio outside the range on the *wrong* side keeps its gradient.

    Args:
        log_ratio: [B, C] (or any shape that begins with B).
        advantages: [B], or the shape of ``log_ratio``.
        clip_low: In [0, 1].
        clip_high: >= 0.

    Returns:
        bool, shape of ``log_ratio``.
    """
    advantages = _beside(advantages, log_ratio)
    ratio = log_ratio.exp()
    return ((advantages > 0) & (ratio > 1 + clip_high)) | (
        (advantages < 0) & (ratio < 1 - clip_low)
    )


def surrogate_slope(
    log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    r"""Derivative of :func:`clipped_surrogate` with respect to the log-ratio.

    .. math:: \frac{\partial L}{\partial \log s} = -A\,s\,m

    m is 0 where :func:`gradient_is_cut` and 1 elsewhere. At ratio 1 the slope is -A.

    Args:
        log_ratio: [B, C] (or any shape that begins with B).
        advantages: [B], or the shape of ``log_ratio``.
        clip_low: In [0, 1].
        clip_high: >= 0.

    Returns:
        Shape of ``log_ratio``.
    """
    cut = gradient_is_cut(log_ratio, advantages, clip_low, clip_high)
    return (-_beside(advantages, log_ratio) * log_ratio.exp()).masked_fill(cut, 0.0)


def step_coefficients(
    chosen_mask_BC: Tensor, slope_BC: Tensor, plan: ChunkPlan, denominator: float | Tensor
) -> Tensor:
    r"""The weight of each step's log-probability in the gradient of the chunk loss.

    .. math:: c_i = \frac{1}{Z\,cs_j} \frac{\partial L_j}{\partial \log s_j}
              \quad (i \in ch_j \text{ chosen}), \qquad
              \nabla_\theta \frac1Z \sum_j L_j = \sum_i c_i \nabla_\theta \ell_i

    Exact, clipping included, as long as the slopes are those of the current parameters. So a
    first pass without gradients finds the slopes and a second one back-propagates
    ``c_i * log_prob_i`` step by step, in micro-batches of any shape.

    Every step of a chunk carries 1/cs of its weight: with all ratios at 1 and chunks drawn
    uniformly, the expected gradient is the step-level one reweighted by N / (C cs).

    Args:
        chosen_mask_BC: [B, C] bool, True where the chunk is trained.
        slope_BC: :func:`surrogate_slope` of the chunk log-ratios, [B, C].
        plan: Partition of the N steps.
        denominator: Z: chosen chunks per sample times samples per update.

    Returns:
        [B, N], 0 where the chunk is not chosen.
    """
    share_BC = slope_BC.masked_fill(~chosen_mask_BC, 0.0) / denominator
    columns = [share / size for share, size in zip(share_BC.unbind(-1), plan.sizes, strict=True)]
    return plan.expand(torch.stack(columns, dim=-1))


def k3_kl(log_ratio: Tensor) -> Tensor:
    r"""Low-variance, never negative estimate of KL(new || old) from samples of the new policy.

    .. math:: k_3 = e^{-r} - 1 + r, \qquad r = \log p_{new} - \log p_{old}

    Unbiased when the samples come from the *new* policy; on rollouts of the old one it is
    accurate to second order in r. Per-dimension log-ratios give a surrogate on that scale, not
    KL per dimension.

    Args:
        log_ratio: r, any shape.

    Returns:
        >= 0, shape of ``log_ratio``; 0 where r = 0.

    Reference: GRPO, arXiv:2402.03300, eq. 4.
    """
    return torch.expm1(-log_ratio) + log_ratio


def reference_kl(new: Gaussian, ref: Gaussian) -> Tensor:
    r"""Exact KL of one step between the trained policy and a frozen one, per latent element.

    .. math:: \frac1D \mathrm{KL}(\mathcal N(\mu, s^2) \,\|\, \mathcal N(\mu_{ref}, s^2))
              = \frac{1}{D}\sum_d \frac{(\mu_d - \mu_{ref,d})^2}{2 s^2}

    s is the standard deviation of the whole step, sqrt(dt) included; an expression that divides
    by g^2 alone differs from this by the factor dt.

    Args:
        new: Transition under the policy being trained.
        ref: Transition under the reference, from the same state; carries no gradient.

    Returns:
        [B] >= 0, nats per element.

    Reference: Flow-GRPO, arXiv:2505.05470, eq. 10.
    """
    return new.kl_per_dim(ref)


def ratio_diagnostics(
    log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> dict[str, Tensor]:
    """What to watch: are the ratios near 1, and how often does the clip bind?

    Detached and left on the device; nothing here waits for it.

    Args:
        log_ratio: [B, C] (or any shape that begins with B), at least one entry.
        advantages: [B], or the shape of ``log_ratio``.
        clip_low: In [0, 1].
        clip_high: >= 0.

    Returns:
        0-dim tensors: ``ratio_mean`` and ``ratio_std`` (population) of the ratios,
        ``clip_fraction`` in [0, 1] (entries whose gradient is cut), ``approx_kl`` (mean of
        :func:`k3_kl`).
    """
    log_ratio = log_ratio.detach()
    ratio = log_ratio.exp()
    cut = gradient_is_cut(log_ratio, advantages.detach(), clip_low, clip_high)
    return {
        "ratio_mean": ratio.mean(),
        "ratio_std": ratio.std(correction=0),
        "clip_fraction": cut.to(ratio.dtype).mean(),
        "approx_kl": k3_kl(log_ratio).mean(),
    }


def policy_gradient_scale(sigmas: Tensor, diffusion: Diffusion) -> Tensor:
    r"""How strongly each step's policy gradient reacts to the velocity, relative to the others.

    .. math:: \kappa_i = \frac{|\partial \mu_i / \partial v|}{s_i}
              = \sqrt{\Delta_i}\,\frac{1 + g_i^2 (1 - \sigma_i) / (2 \sigma_i)}{g_i}

    On-policy, the gradient of one step's log-probability with respect to v has this standard
    deviation per element. It grows towards low noise: at 17 steps and eta 0.7 by a factor of
    more than 50 with Flow-GRPO's coefficient and of 6 with DanceGRPO's.

    Args:
        sigmas: Schedule, [K+1], decreasing to 0 (:func:`.schedules.validate_sigmas`).
        diffusion: g(sigma), with a density.

    Returns:
        [K] > 0.

    Raises:
        ValueError: If the diffusion coefficient is 0.
    """
    if not diffusion.has_density:
        raise ValueError(
            f"{diffusion} injects no noise, and a deterministic step has no policy gradient; "
            "use a diffusion coefficient with eta above 0"
        )
    sigmas = at_least_float32(sigmas)
    sigma_K, sigma_next_K = sigmas[:-1], sigmas[1:]
    g_K = diffusion(sigma_K, sigma_next_K)
    slope_K = 1 + g_K.square() * (1 - sigma_K) / (2 * sigma_K)
    return (sigma_K - sigma_next_K).sqrt() * slope_K / g_K
