# SPDX-License-Identifier: Apache-2.0
"""Statistics of measured speeds: shares of step, prompt and noise, and confidence intervals.

Axes: P prompts x S seeds, crossed; N trained steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Shares:
    """Where the variance of log speed comes from; the four shares sum to 1.

    Attributes:
        step: Which step of the sampler it is.
        prompt: Which prompt, at a given step.
        seed: Which noise, at a given step.
        residual: Prompt and noise together.
        prompt_std: Standard deviation between prompts, of log speed: 0.01 is one per cent.
    """

    step: float
    prompt: float
    seed: float
    residual: float
    prompt_std: float

    @property
    def sentence(self) -> str:
        """A sentence on whether the dynamics depend on the prompt."""
        return (
            f"the step explains {100 * self.step:.1f} % of the variance of log speed, the prompt "
            f"{100 * self.prompt:.2f} %; at a given step, prompts differ by "
            f"{100 * np.expm1(self.prompt_std):.1f} %"
        )


def _mean_squares(values_PSN: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """Mean squares of prompts, seeds and their interaction at each step, [N] each."""
    if values_PSN.ndim != 3 or min(values_PSN.shape[:2]) < 2 or not np.isfinite(values_PSN).all():
        raise ValueError(
            f"speeds have shape {values_PSN.shape}; to tell prompts from noise they must be "
            "finite, [P, S, N], of at least 2 prompts and 2 seeds"
        )
    num_prompts, num_seeds, _ = values_PSN.shape
    mean_N = values_PSN.mean((0, 1))
    prompt_PN, seed_SN = values_PSN.mean(1) - mean_N, values_PSN.mean(0) - mean_N
    rest_PSN = values_PSN - mean_N - prompt_PN[:, None] - seed_SN[None]
    return (
        num_seeds * np.square(prompt_PN).sum(0) / (num_prompts - 1),
        num_prompts * np.square(seed_SN).sum(0) / (num_seeds - 1),
        np.square(rest_PSN).sum((0, 1)) / ((num_prompts - 1) * (num_seeds - 1)),
    )


def variance_shares(speed_PSN: ArrayLike) -> Shares:
    r"""Decompose the variance of log speed into step, prompt, seed and residual.

    At each step, :math:`\log L_{psi} = \mu_i + a_{pi} + b_{si} + e_{psi}` with random effects of
    the prompt, the seed and the rest. With the mean squares of the crossed design at step i,
    averaged over the steps,

    .. math:: \sigma_e^2 = MS_e, \quad
              \sigma_a^2 = \max\Big(0, \frac{MS_a - MS_e}{S}\Big), \quad
              \sigma_b^2 = \max\Big(0, \frac{MS_b - MS_e}{P}\Big), \quad
              \sigma_\mu^2 = \frac1N \sum_i (\bar\mu_i - \bar\mu)^2,

    and each share is its variance over the sum of the four. Prompt and seed thus include how they
    change the curve's shape, not only its level. The estimates of the effects are unbiased but for
    the cut at 0: few prompts and seeds do not inflate them. That of the step includes the error of
    the means, which is of the order of the others over P or S.

    Args:
        speed_PSN: Speeds > 0, [P, S, N] with P, S >= 2.

    Returns:
        The shares. A speed that never varies counts as all step.

    Raises:
        ValueError: If a speed is not positive and finite, or there are too few prompts or seeds.

    Reference: Brennan, Generalizability Theory (2001), chapter 3 (the crossed p x i design).
    """
    speed_PSN = np.asarray(speed_PSN, dtype=np.float64)
    if not speed_PSN.size or not speed_PSN.min() > 0:
        raise ValueError(
            "shares of the variance of log speed need speeds above 0; measure with distance l1 or "
            "l2, on a sampler that moves at every step"
        )
    logs_PSN = np.log(speed_PSN)
    num_prompts, num_seeds, _ = logs_PSN.shape if logs_PSN.ndim == 3 else (0, 0, 0)
    of_prompt, of_seed, of_rest = (float(ms.mean()) for ms in _mean_squares(logs_PSN))
    variances = np.array(
        [
            logs_PSN.mean((0, 1)).var(),
            max(0.0, (of_prompt - of_rest) / num_seeds),
            max(0.0, (of_seed - of_rest) / num_prompts),
            of_rest,
        ]
    )
    total = variances.sum()
    shares = variances / total if total > 0 else np.array([1.0, 0.0, 0.0, 0.0])
    return Shares(*(float(share) for share in shares), prompt_std=float(variances[1] ** 0.5))


def crossed_interval(
    values_PSN: ArrayLike, level: float = 0.95
) -> tuple[NDArray, NDArray, NDArray]:
    r"""Mean at each step over prompts and seeds, with an interval that counts both as random.

    .. math:: \bar y_i \pm t_\nu \sqrt{V_i}, \qquad V_i = a_i + b_i + e_i, \qquad
              \nu = \frac{V_i^2}{\frac{a_i^2}{P-1} + \frac{b_i^2}{S-1} + \frac{e_i^2}{(P-1)(S-1)}}

    with :math:`a = \max(0, MS_a - MS_e)/PS` the part of the prompts, b that of the seeds and
    :math:`e = MS_e/PS` (Satterthwaite's degrees of freedom). The trajectories of one prompt, and
    those of one seed, are alike; counting all P S of them as independent would make it too short.

    Args:
        values_PSN: [P, S, N] with P, S >= 2.
        level: Confidence level, inside (0, 1).

    Returns:
        Mean, lower and upper end, [N] each.

    Raises:
        ValueError: If there are too few prompts or seeds.

    Reference: Satterthwaite, Biometrics Bulletin 2 (1946), 110-114.
    """
    from scipy.stats import t as student

    values_PSN = np.asarray(values_PSN, dtype=np.float64)
    of_prompt, of_seed, of_rest = _mean_squares(values_PSN)
    num_prompts, num_seeds, _ = values_PSN.shape
    count = num_prompts * num_seeds
    by_prompt = np.maximum(of_prompt - of_rest, 0.0) / count
    by_seed = np.maximum(of_seed - of_rest, 0.0) / count
    by_rest = of_rest / count
    variance = by_prompt + by_seed + by_rest
    spread = (
        by_prompt**2 / (num_prompts - 1)
        + by_seed**2 / (num_seeds - 1)
        + by_rest**2 / ((num_prompts - 1) * (num_seeds - 1))
    )
    freedom = np.divide(variance**2, spread, out=np.ones_like(variance), where=spread > 0)
    half = student.ppf(0.5 + level / 2, freedom) * np.sqrt(variance)
    mean = values_PSN.mean((0, 1))
    return mean, mean - half, mean + half
