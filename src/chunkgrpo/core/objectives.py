# SPDX-License-Identifier: Apache-2.0
r"""The clipped surrogate on chunks, its exact gradient in pieces, KL terms and diagnostics.

Per-dimension log-probabilities :math:`\ell_i` of the N trained steps become one log-ratio per
chunk; the surrogate of that ratio is the loss. Because a chunk's loss depends on its steps only
through that one number, its gradient splits into one term per step with a scalar coefficient
(:func:`step_coefficients`), which can be back-propagated one at a time: memory stays flat.

Axes: B samples, N trained steps, K sampler steps, C chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .chunks import ChunkPlan
from .precision import at_least_float32
from .sde import Diffusion, Gaussian, Kernel


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


def _importance_loss(log_ratio: Tensor, advantages: Tensor) -> Tensor:
    """-A s, which is its own derivative with respect to log s."""
    return -_beside(advantages, log_ratio) * log_ratio.exp()


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
    return _importance_loss(log_ratio, advantages).masked_fill(cut, 0.0)


class TrustRegion(Protocol):
    """Decides where a chunk has moved far enough: its loss, and the loss's slope.

    ``divergence`` is KL(new || old) per latent element of each chunk, [B, C], a constant.

    Attributes:
        needs_divergence: Whether the KL of the chunk to the sampling policy is read.
    """

    needs_divergence: bool

    def value(self, log_ratio: Tensor, advantages: Tensor, divergence: Tensor) -> Tensor:
        """Loss of each ratio, shape of ``log_ratio``."""
        ...

    def slope(self, log_ratio: Tensor, advantages: Tensor, divergence: Tensor) -> Tensor:
        """Derivative of the loss with respect to the log-ratio, shape of ``log_ratio``."""
        ...

    def is_cut(self, log_ratio: Tensor, advantages: Tensor, divergence: Tensor) -> Tensor:
        """Where the trust region holds the policy back, bool, shape of ``log_ratio``."""
        ...


@dataclass(frozen=True)
class Clip:
    """The two-sided clip of :func:`clipped_surrogate`.

    Attributes:
        low, high: Clip range below and above 1.
    """

    low: float = 5e-5
    high: float = 5e-5
    needs_divergence = False

    def value(self, log_ratio: Tensor, advantages: Tensor, divergence: Tensor) -> Tensor:
        """:func:`clipped_surrogate`."""
        return clipped_surrogate(log_ratio, advantages, self.low, self.high)

    def slope(self, log_ratio: Tensor, advantages: Tensor, divergence: Tensor) -> Tensor:
        """-A s where not cut."""
        return region_slope(self, log_ratio, advantages, divergence)

    def is_cut(self, log_ratio: Tensor, advantages: Tensor, divergence: Tensor) -> Tensor:
        """:func:`gradient_is_cut`."""
        return gradient_is_cut(log_ratio, advantages, self.low, self.high)


@dataclass(frozen=True)
class KlMask:
    r"""Drop a chunk that has left the trust region and still moves the rewarded way.

    .. math:: L = -A s\,m, \qquad
              m = 0 \iff \mathrm{KL}_j \ge \delta \wedge A \log s > 0

    :math:`\mathrm{KL}_j` is the mean over the chunk of the closed-form KL(new || old) per latent
    element: unlike the ratio it depends on the step's mean alone, not on the noise that was drawn.

    Attributes:
        threshold: delta > 0, nats per element.

    Reference: Flow-DPPO, arXiv:2606.11025 (step level); the chunk form is this library's.
    """

    threshold: float = 1e-5
    needs_divergence = True

    def __post_init__(self) -> None:
        """Refuse a threshold that would drop everything."""
        if not self.threshold > 0:
            raise ValueError(f"the KL threshold is {self.threshold}; it must be above 0; try 1e-5")

    def value(self, log_ratio: Tensor, advantages: Tensor, divergence: Tensor) -> Tensor:
        """-A s, and 0 where dropped."""
        return region_slope(self, log_ratio, advantages, divergence)

    def slope(self, log_ratio: Tensor, advantages: Tensor, divergence: Tensor) -> Tensor:
        """-A s where not cut."""
        return region_slope(self, log_ratio, advantages, divergence)

    def is_cut(self, log_ratio: Tensor, advantages: Tensor, divergence: Tensor) -> Tensor:
        """Where the chunk is dropped."""
        moved = _beside(advantages, log_ratio) * log_ratio > 0
        return moved & (divergence >= self.threshold)


@dataclass(frozen=True)
class NoTrustRegion:
    """The plain importance-weighted surrogate, -A s."""

    needs_divergence = False

    def value(self, log_ratio: Tensor, advantages: Tensor, divergence: Tensor) -> Tensor:
        """-A s."""
        return _importance_loss(log_ratio, advantages)

    def slope(self, log_ratio: Tensor, advantages: Tensor, divergence: Tensor) -> Tensor:
        """-A s where not cut."""
        return region_slope(self, log_ratio, advantages, divergence)

    def is_cut(self, log_ratio: Tensor, advantages: Tensor, divergence: Tensor) -> Tensor:
        """False everywhere."""
        return torch.zeros_like(log_ratio, dtype=torch.bool)


def ratio_scale(form: str, std_N: Tensor, num_elements: int) -> Tensor:
    r"""What a step's log-ratio per dimension is multiplied with before it enters a chunk's ratio.

    Published objectives use log-ratios on different scales; all are the per-dimension one times a
    number known before training, so one code path serves them. With s the step's standard
    deviation and D latent elements:

    - ``per_dimension``: 1. Chunk-GRPO, DanceGRPO, Flow-GRPO.
    - ``full``: D, the true density ratio; explodes with the resolution.
    - ``guard``: s, which gives the ratio the same spread at every step; used with the bias
      b = KL(new || old) per dimension added, so that it is centred as well. GRPO-Guard.
    - ``squared_error``: 2 s^2, which leaves the difference of the squared errors
      mean_d (x' - mu)^2 without a variance below it. Flow-CPS.

    Args:
        form: One of ``RATIO_FORMS``.
        std_N: Standard deviation of each step, [N] > 0.
        num_elements: D >= 1.

    Returns:
        [N].

    Raises:
        ValueError: If the form is unknown.
    """
    if form not in RATIO_FORMS:
        raise ValueError(f"the ratio form is {form!r}; it must be one of {', '.join(RATIO_FORMS)}")
    return RATIO_FORMS[form](at_least_float32(std_N), num_elements)


RATIO_FORMS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "per_dimension": lambda std_N, num_elements: torch.ones_like(std_N),
    "full": lambda std_N, num_elements: torch.full_like(std_N, float(num_elements)),
    "guard": lambda std_N, num_elements: std_N.clone(),
    "squared_error": lambda std_N, num_elements: 2 * std_N.square(),
}
"""Scales of :func:`ratio_scale` by the name a configuration uses: (std_N, D) -> [N]."""


def equal_kappa_weights(kappa_N: Tensor) -> Tensor:
    r"""Weights that give every step's policy gradient the same size, with mean 1.

    .. math:: w_i = \frac{1/\kappa_i}{\frac1N \sum_k 1/\kappa_k}

    kappa (:func:`policy_gradient_scale`) grows by more than an order of magnitude towards low
    noise, and with it the part of the update that the last steps decide. The weights multiply the
    steps' log-ratios inside a chunk. They make steps of *one* chunk, or of equal chunks, alike; a
    chunk's ratio is a mean over its steps, so across unequal chunks a step also counts 1 / cs,
    which :func:`chunk_size_weights` undo.

    Args:
        kappa_N: [N] > 0.

    Returns:
        [N] > 0, mean 1.
    """
    inverse = 1 / at_least_float32(kappa_N)
    return inverse / inverse.mean()


def noise_level_weights(std_N: Tensor) -> Tensor:
    r"""Weights proportional to the noise a step injects, with mean 1.

    .. math:: w_i = \frac{s_i}{\frac1N \sum_k s_k}

    They multiply the loss of a step (of a chunk: their mean over its steps).

    Args:
        std_N: Standard deviation of each step, [N] > 0.

    Returns:
        [N] > 0, mean 1.

    Reference: TempFlow-GRPO, arXiv:2508.04324, eq. 8.
    """
    std_N = at_least_float32(std_N)
    return std_N / std_N.mean()


def inverse_dt_weights(dt_N: Tensor) -> Tensor:
    r"""Weights 1 / dt, which multiply the loss of a step.

    Args:
        dt_N: Length of each step, [N] > 0.

    Returns:
        [N] > 0; not normalised, as published.

    Reference: GRPO-Guard, arXiv:2510.22319.
    """
    return 1 / at_least_float32(dt_N)


def chunk_size_weights(plan: ChunkPlan) -> Tensor:
    r"""Weights of chunks in proportion to their size, with mean 1 over chunks.

    .. math:: w_i = \frac{C\,cs_j}{N} \quad (i \in ch_j)

    They multiply the loss of a chunk, which is a mean over its steps: where chunks are chosen
    uniformly, every step then has the coefficient 1 / N, whatever the sizes
    (:func:`step_coefficients`). Without them steps of long chunks count less.

    Args:
        plan: Partition of the N steps.

    Returns:
        [N] > 0 float32, on the CPU; one value within a chunk, 1 where chunks are equal.

    Reference: none; a choice of this library.
    """
    sizes_C = torch.tensor(plan.sizes, dtype=torch.float32)
    return plan.expand(sizes_C * plan.num_chunks / plan.num_steps)


def implicit_weights(plan: ChunkPlan) -> Tensor:
    r"""Weights of steps as a chunk plan has them by its construction, with mean 1 over steps.

    .. math:: w_i = \frac{N}{C\,cs_j} \quad (i \in ch_j)

    They multiply the losses of *single* steps. With all ratios at 1 and uniform choices, the
    expected gradient of step-level GRPO is then that of the chunk loss with this plan: what is
    left between the two is the ratio's unit. The inverse of :func:`chunk_size_weights`.

    Args:
        plan: The partition of the N steps whose weights are wanted.

    Returns:
        [N] > 0 float32, on the CPU.

    Reference: none; follows from Chunk-GRPO, arXiv:2510.21583, eq. 14 and 15, at ratio 1.
    """
    return 1 / chunk_size_weights(plan)


INNER_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": torch.ones_like,
    "equal_kappa": equal_kappa_weights,
}
"""Weights inside a chunk's ratio by name: kappa_N -> [N]."""

OUTER_WEIGHTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": lambda std_N, dt_N: torch.ones_like(std_N),
    "noise_level": lambda std_N, dt_N: noise_level_weights(std_N),
    "inverse_dt": lambda std_N, dt_N: inverse_dt_weights(dt_N),
}
"""Weights of a step's loss by name: (std_N, dt_N) -> [N]."""

PLAN_WEIGHTS: dict[str, Callable[[ChunkPlan], Tensor]] = {
    "chunk_size": chunk_size_weights,
    "implicit": implicit_weights,
}
"""Weights of a loss that come from a cut of the steps and not from the schedule: plan -> [N]."""


def region_slope(
    region: TrustRegion, log_ratio: Tensor, advantages: Tensor, divergence: Tensor
) -> Tensor:
    r"""Derivative of a trust region's loss with respect to the log-ratio, -A s where not cut.

    Args:
        region: The trust region.
        log_ratio: [B, C].
        advantages: [B], or the shape of ``log_ratio``.
        divergence: KL(new || old) per element of each chunk, [B, C]; a constant.

    Returns:
        Shape of ``log_ratio``.
    """
    cut = region.is_cut(log_ratio, advantages, divergence)
    return _importance_loss(log_ratio, advantages).masked_fill(cut, 0.0)


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


def k3_slope(log_ratio: Tensor) -> Tensor:
    r"""Derivative of :func:`k3_kl`, :math:`1 - e^{-r}`.

    Args:
        log_ratio: r, any shape.

    Returns:
        Shape of ``log_ratio``; 0 where r = 0, so the penalty starts to pull with the second update.
    """
    return -torch.expm1(-log_ratio)


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


def transition_scale(kernel: Kernel, sigmas: Tensor) -> Tensor:
    r"""kappa of any kernel: how strongly each step's policy gradient reacts to the velocity.

    .. math:: \kappa_i = \frac{|\partial \mu_i / \partial v|}{s_i}

    The mean of every kernel is linear in x and v, so the derivative is read off the kernel itself:
    mu(x=0, v=1). For a :class:`~.sde.Transition` it equals :func:`policy_gradient_scale`.

    Args:
        kernel: A kernel with a density.
        sigmas: Noise levels of the steps, [N+1].

    Returns:
        [N] > 0.
    """
    sigma_N, next_N = at_least_float32(sigmas[:-1]), at_least_float32(sigmas[1:])
    zeros = torch.zeros_like(sigma_N)[:, None]
    step = kernel(zeros, torch.ones_like(zeros), sigma_N, next_N)
    return step.mean[:, 0].abs() / kernel.std(sigma_N, next_N)
