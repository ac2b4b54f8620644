# SPDX-License-Identifier: Apache-2.0
"""Divergences from the sampling policy and from the reference.

Axes: B samples, N trained steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from .names import ByKind
from .sde import Gaussian


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


# --- the choices of a run -----------------------------------------------------------------------


def _check_weight(weight: float) -> None:
    if not weight > 0:
        raise ValueError(f"weight is {weight}; it must be above 0; kind 'none' turns the KL off")


@dataclass(frozen=True)
class NoKl:
    """No pull to the reference, which is then not evaluated."""

    kind: Literal["none"] = field(default="none", kw_only=True, repr=False)
    weight: ClassVar[float] = 0.0

    def scale(self, dt_N: Tensor) -> Tensor:
        """Return ones, [N]."""
        return torch.ones_like(dt_N)


@dataclass(frozen=True)
class TransitionKl:
    """The KL between the two transitions, :func:`reference_kl`.

    Attributes:
        weight: Above 0.
    """

    weight: float
    kind: Literal["transition"] = field(default="transition", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        """Refuse a weight that turns it off or around."""
        _check_weight(self.weight)

    def scale(self, dt_N: Tensor) -> Tensor:
        """Return what the KL of each step is multiplied with: ones, [N]."""
        return torch.ones_like(dt_N)


@dataclass(frozen=True)
class RateKl:
    """The KL between the two transitions times dt: Flow-GRPO divides by g^2 and not by g^2 dt.

    Attributes:
        weight: Above 0; 0.04 and 0.01 published.
    """

    weight: float
    kind: Literal["rate"] = field(default="rate", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        """Refuse a weight that turns it off or around."""
        _check_weight(self.weight)

    def scale(self, dt_N: Tensor) -> Tensor:
        """Return what the KL of each step is multiplied with: dt, [N]."""
        return dt_N


AnyKl = Annotated[NoKl | TransitionKl | RateKl, ByKind()]
"""What a run can choose its KL to the reference from."""
