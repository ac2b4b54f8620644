# SPDX-License-Identifier: Apache-2.0
r"""The importance ratio of a chunk, and how its gradient splits into one term per step.

Per-dimension log-probabilities :math:`\ell_i` of the N trained steps become one log-ratio per
chunk. Because a chunk's loss depends on its steps only through that one number, its gradient splits
into one term per step with a scalar coefficient (:func:`step_coefficients`), which can be
back-propagated one at a time: memory stays flat.

Axes: B samples, N trained steps, K sampler steps, C chunks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .plans import ChunkPlan
from .precision import at_least_float32
from .sde import Kernel


def chunk_log_ratio(
    new_BN: Tensor,
    old_BN: Tensor,
    plan: ChunkPlan,
    scale_N: Tensor | float = 1.0,
    bias_BN: Tensor | float = 0.0,
) -> Tensor:
    r"""Log of the importance ratio of each chunk: the mean over its steps.

    .. math:: \log s_j = \frac{1}{cs_j} \sum_{i \in ch_j} a_i
              (\ell_i^{new} - \ell_i^{old} + b_i)

    As published for Chunk-GRPO, a = 1 and b = 0. Then it is the geometric mean of the steps'
    ratios. As the :math:`\ell_i` are per latent element, it is the density ratio of the paper to
    the power 1/D. Chunks of one give the step ratio to the last bit; one chunk of all steps gives
    the sequence-level ratio.

    Args:
        new_BN: Log-probabilities per dimension under the policy being trained, [B, N].
        old_BN: The same under the policy that sampled, [B, N]; carries no gradient.
        plan: Partition of the N steps.
        scale_N: a, the factor of each step, [N] (:func:`ratio_scale`, ``INNER_WEIGHTS``).
        bias_BN: b, [B, N]; the KL(new || old) of the form ``guard``.

    Returns:
        [B, C], 0 where the policy has not moved.

    Raises:
        ValueError: If the plan does not cover N steps.

    Reference: Chunk-GRPO, arXiv:2510.21583, eq. 15.
    """
    return plan.reduce(scale_N * (new_BN - old_BN + bias_BN))


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


def transition_scale(kernel: Kernel, sigmas: Tensor) -> Tensor:
    r"""kappa of any kernel: how strongly each step's policy gradient reacts to the velocity.

    .. math:: \kappa_i = \frac{|\partial \mu_i / \partial v|}{s_i}

    The mean of every kernel is linear in x and v, so the derivative is read off the kernel itself:
    mu(x=0, v=1). For a :class:`~.sde.Transition` it is

    .. math:: \kappa_i = \sqrt{\Delta_i}\,\frac{1 + g_i^2 (1 - \sigma_i) / (2 \sigma_i)}{g_i}

    On-policy, the gradient of one step's log-probability with respect to v has this standard
    deviation per element. It grows towards low noise: at 17 steps and eta 0.7 by a factor of
    more than 50 with Flow-GRPO's coefficient and of 6 with DanceGRPO's.

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
