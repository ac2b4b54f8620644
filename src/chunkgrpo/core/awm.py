# SPDX-License-Identifier: Apache-2.0
"""AWM (arXiv:2509.25050): a log-probability read off the pretraining loss.

Axes: B samples, T times per sample, K sampler steps, Q (sample, time) pairs, D latent elements.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from torch import Generator, Tensor

from .names import ByKind
from .precision import at_least_float32

# Keeps the slope of a root finite where the error is 0.
SMALLEST_ERROR = 1e-10


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


# --- the choices of a run -----------------------------------------------------------------------


@dataclass(frozen=True)
class UniformLogProb:
    """:func:`uniform_log_prob`."""

    kind: Literal["uniform"] = field(default="uniform", kw_only=True, repr=False)

    def __call__(self, error: Tensor, sigma: Tensor) -> Tensor:
        """Return the pseudo-log-probability, [Q]."""
        return uniform_log_prob(error, sigma)


@dataclass(frozen=True)
class LinearLogProb:
    """:func:`linear_log_prob`."""

    kind: Literal["t"] = field(default="t", kw_only=True, repr=False)

    def __call__(self, error: Tensor, sigma: Tensor) -> Tensor:
        """Return the pseudo-log-probability, [Q]."""
        return linear_log_prob(error, sigma)


@dataclass(frozen=True)
class QuadraticLogProb:
    """:func:`quadratic_log_prob`."""

    kind: Literal["t2"] = field(default="t2", kw_only=True, repr=False)

    def __call__(self, error: Tensor, sigma: Tensor) -> Tensor:
        """Return the pseudo-log-probability, [Q]."""
        return quadratic_log_prob(error, sigma)


@dataclass(frozen=True)
class HuberLogProb:
    """:func:`huber_log_prob`."""

    kind: Literal["huber"] = field(default="huber", kw_only=True, repr=False)

    def __call__(self, error: Tensor, sigma: Tensor) -> Tensor:
        """Return the pseudo-log-probability, [Q]."""
        return huber_log_prob(error, sigma)


@dataclass(frozen=True)
class GeneralHuberLogProb:
    """:func:`ghuber_log_prob`.

    Attributes:
        power: p > 0; 0.25 in the published runs.
    """

    power: float = 0.25
    kind: Literal["ghuber"] = field(default="ghuber", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        """Refuse a power that has no slope."""
        if not self.power > 0:
            raise ValueError(
                f"power is {self.power}; it must be positive; 0.25 in the published runs"
            )

    def __call__(self, error: Tensor, sigma: Tensor) -> Tensor:
        """Return the pseudo-log-probability, [Q]."""
        return ghuber_log_prob(error, sigma, self.power)


AnyPseudoLogProb = Annotated[
    UniformLogProb | LinearLogProb | QuadraticLogProb | HuberLogProb | GeneralHuberLogProb,
    ByKind(),
]
"""What a run can choose its pseudo-log-probability from: (error [Q], sigma [Q]) -> [Q]."""


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
