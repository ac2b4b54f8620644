# SPDX-License-Identifier: Apache-2.0
"""Trust regions of the importance ratio: the clipped surrogate and its relatives.

Axes: B samples, C chunks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from .precision import beside


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
    advantages = beside(advantages, log_ratio)
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
    advantages = beside(advantages, log_ratio)
    ratio = log_ratio.exp()
    return ((advantages > 0) & (ratio > 1 + clip_high)) | (
        (advantages < 0) & (ratio < 1 - clip_low)
    )


def importance_loss(log_ratio: Tensor, advantages: Tensor) -> Tensor:
    """-A s, which is its own derivative with respect to log s."""
    return -beside(advantages, log_ratio) * log_ratio.exp()


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
    return importance_loss(log_ratio, advantages).masked_fill(cut, 0.0)


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
        low: Clip range of the ratio below 1, in (0, 1].
        high: Clip range above 1, above 0.
    """

    low: float = 5e-5
    high: float = 5e-5
    kind: Literal["clip"] = field(default="clip", kw_only=True, repr=False)

    needs_divergence = False

    def __post_init__(self) -> None:
        """Refuse a range that lies on one side of 1."""
        if not (0 < self.low <= 1 and self.high > 0):
            raise ValueError(
                f"the clip range is {self.low} below and {self.high} above 1; low must be in "
                "(0, 1] and high above 0; 5e-5 is published, for ratios per dimension"
            )

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
    kind: Literal["kl_mask"] = field(default="kl_mask", kw_only=True, repr=False)

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
        moved = beside(advantages, log_ratio) * log_ratio > 0
        return moved & (divergence >= self.threshold)


@dataclass(frozen=True)
class NoTrustRegion:
    """The plain importance-weighted surrogate, -A s."""

    kind: Literal["none"] = field(default="none", kw_only=True, repr=False)

    needs_divergence = False

    def value(self, log_ratio: Tensor, advantages: Tensor, divergence: Tensor) -> Tensor:
        """-A s."""
        return importance_loss(log_ratio, advantages)

    def slope(self, log_ratio: Tensor, advantages: Tensor, divergence: Tensor) -> Tensor:
        """-A s where not cut."""
        return region_slope(self, log_ratio, advantages, divergence)

    def is_cut(self, log_ratio: Tensor, advantages: Tensor, divergence: Tensor) -> Tensor:
        """False everywhere."""
        return torch.zeros_like(log_ratio, dtype=torch.bool)


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
    return importance_loss(log_ratio, advantages).masked_fill(cut, 0.0)
