# SPDX-License-Identifier: Apache-2.0
"""One stochastic sampling step: from a state and a velocity to a Gaussian over the next state.

A flow model's ODE becomes a policy when noise is added in a way that leaves the marginals
unchanged. Flow-GRPO and DanceGRPO do this with the *same* transition and differ only in the
diffusion coefficient g(sigma); g = 0 is the ODE.

Two words that must not be confused: ``diffusion`` is g(sigma), per sqrt(sigma); ``std`` is the
full standard deviation of one transition, g * sqrt(dt).

Axes: B samples, D latent elements (however many trailing axes hold them).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch
from torch import Generator, Tensor

from .precision import at_least_float32, beside

HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)

# float32 resolves 6e-8 next to 1; a first sigma that missed 1 by rounding must count as 1,
# since 1 / (1 - sigma) would otherwise explode instead of being replaced.
PURE_NOISE_TOLERANCE = 1e-6


def _rows(values: Tensor) -> Tensor:
    """[B, *latent] -> [B, D]."""
    return values.reshape(values.shape[0], -1)


@dataclass(frozen=True, eq=False)
class Gaussian:
    """An isotropic or diagonal normal distribution over the next state, one per sample.

    Inputs below float32 are upcast on entry, so every number that leaves is float32 or better.

    Attributes:
        mean: [B, *latent].
        std: Standard deviation of the whole transition (not g), broadcastable to ``mean``.
        has_density: False when ``std`` is known to be zero. Asking such a distribution for a
            log-probability or a divergence is an error, told without looking at the device.
    """

    mean: Tensor
    std: Tensor
    has_density: bool = True

    def __post_init__(self) -> None:
        """Upcast once, here, so that no method has to think of it."""
        object.__setattr__(self, "mean", at_least_float32(self.mean))
        object.__setattr__(self, "std", at_least_float32(self.std))

    def sample(self, generator: Generator | None = None, *, noise: Tensor | None = None) -> Tensor:
        r"""Draw a next state, ``mean + std * noise``.

        Args:
            generator: Source of standard normal noise, on the device of ``mean``.
            noise: The noise itself, shape of ``mean``, instead of ``generator``.

        Returns:
            [B, *latent]. Without a density it is ``mean`` exactly, and nothing is drawn.

        Raises:
            ValueError: If neither or both sources are given; the global random state is never
                used, so that a seed reproduces a run.
        """
        if not self.has_density:
            return self.mean
        if (generator is None) == (noise is None):
            raise ValueError(
                "sample() got "
                + ("neither a generator nor noise" if noise is None else "a generator and noise")
                + "; exactly one source of randomness is needed; pass generator=... or noise=..."
            )
        if noise is None:
            noise = torch.randn(
                self.mean.shape,
                generator=generator,
                dtype=self.mean.dtype,
                device=self.mean.device,
            )
        return self.mean + self.std * at_least_float32(noise)

    def log_prob(self, value: Tensor) -> Tensor:
        r"""Normalised log-density, summed over the latent elements.

        .. math:: \log p(y) = \sum_d -\tfrac{(y_d-\mu_d)^2}{2 s^2} - \log s - \tfrac12\log 2\pi

        Args:
            value: y, [B, *latent].

        Returns:
            [B], in nats.

        Raises:
            ValueError: If the distribution has no density.
        """
        return _rows(self._log_density(value)).sum(dim=1)

    def log_prob_per_dim(self, value: Tensor) -> Tensor:
        r"""Normalised log-density, averaged over the latent elements: :meth:`log_prob` / D.

        This is what importance ratios are made of: the ratio of two of these, exponentiated, is
        the density ratio to the power 1/D, whose scale does not depend on the resolution. A clip
        range of 5e-5 is meaningful for it only.

        Args:
            value: [B, *latent].

        Returns:
            [B], in nats per element.

        Raises:
            ValueError: If the distribution has no density.
        """
        return _rows(self._log_density(value)).mean(dim=1)

    def kl(self, other: Gaussian) -> Tensor:
        r"""Kullback-Leibler divergence KL(self || other), summed over the latent elements.

        .. math:: \sum_d \tfrac12\left(r^2 - 1\right) - \log r
                  + \frac{(\mu_d - \mu'_d)^2}{2 s'^2}, \qquad r = s / s'

        Args:
            other: The second argument of the divergence, same shape.

        Returns:
            [B] >= 0, in nats.

        Raises:
            ValueError: If either distribution has no density.
        """
        return _rows(self._divergence(other)).sum(dim=1)

    def kl_per_dim(self, other: Gaussian) -> Tensor:
        """KL(self || other) averaged over the latent elements: :meth:`kl` / D.

        Args:
            other: The second argument of the divergence, same shape.

        Returns:
            [B] >= 0, in nats per element.

        Raises:
            ValueError: If either distribution has no density.
        """
        return _rows(self._divergence(other)).mean(dim=1)

    def _require_density(self, what: str) -> None:
        if not self.has_density:
            raise ValueError(
                f"{what} was asked of a deterministic step (std is 0), which has no density; "
                "sample this step with a diffusion coefficient above 0, or leave it out of "
                "the trained steps"
            )

    def _log_density(self, value: Tensor) -> Tensor:
        self._require_density("a log-probability")
        normalised = (at_least_float32(value) - self.mean) / self.std
        return -0.5 * normalised.square() - self.std.log() - HALF_LOG_TWO_PI

    def _divergence(self, other: Gaussian) -> Tensor:
        self._require_density("a divergence")
        other._require_density("a divergence")
        twice_log_ratio = 2 * (self.std / other.std).log()
        # Grouped so that equal stds contribute exactly 0: the squared shift of the means is
        # about 1e-8 here and would drown in 1/2 - 1/2.
        spread = 0.5 * (torch.expm1(twice_log_ratio) - twice_log_ratio)
        return spread + 0.5 * ((self.mean - other.mean) / other.std).square()


class Diffusion(Protocol):
    """g(sigma): how much noise a step injects, per sqrt(sigma)."""

    @property
    def has_density(self) -> bool:
        """Whether steps with this coefficient have a density, i.e. g > 0."""
        ...

    def __call__(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """g at ``sigma`` for the step that ends at ``sigma_next``; shape of ``sigma``."""
        ...


class _NoiseLevel:
    """What coefficients with a noise level share."""

    eta: float

    def __post_init__(self) -> None:
        """Refuse a noise level that is negative or not finite."""
        if not (math.isfinite(self.eta) and self.eta >= 0):
            raise ValueError(
                f"eta is {self.eta}; a noise level must be finite and >= 0; 0 is the ODE"
            )

    @property
    def has_density(self) -> bool:
        """Whether eta > 0."""
        return self.eta > 0


@dataclass(frozen=True)
class FlowDiffusion(_NoiseLevel):
    r"""Flow-GRPO's coefficient: much noise early, little late.

    .. math:: g(\sigma) = \eta \sqrt{\frac{\sigma}{1 - \sigma_{ref}}}

    sigma_ref is sigma, except at pure noise (sigma within 1e-6 of 1), where it is sigma_next: the
    coefficient diverges there, and the first step of a grid uses the next grid point instead.
    That step therefore injects a standard deviation of eta however short it is, and the marginals
    of a grid that starts at 1 converge at order min(1, eta^2) in the step size rather than 1.

    Attributes:
        eta: Noise level >= 0; 0.7 in the published runs. 0 is the ODE.

    Reference: Flow-GRPO, arXiv:2505.05470, section 4.2.
    """

    eta: float = 0.7
    kind: Literal["flow"] = field(default="flow", kw_only=True, repr=False)

    def __call__(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """g(sigma), shape of ``sigma`` (broadcast with ``sigma_next``), float32 or better."""
        sigma, sigma_next = at_least_float32(sigma), at_least_float32(sigma_next)
        at_pure_noise = (1 - sigma).abs() <= PURE_NOISE_TOLERANCE
        sigma_ref = torch.where(at_pure_noise, sigma_next, sigma)
        return self.eta * (sigma / (1 - sigma_ref)).sqrt()


@dataclass(frozen=True)
class DanceDiffusion(_NoiseLevel):
    r"""DanceGRPO's coefficient: the same at every sigma.

    .. math:: g(\sigma) = \eta

    Attributes:
        eta: Noise level >= 0; 0.3 in the published runs. 0 is the ODE.

    Reference: DanceGRPO, arXiv:2505.07818, section 3.2.
    """

    eta: float = 0.3
    kind: Literal["dance"] = field(default="dance", kw_only=True, repr=False)

    def __call__(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """g(sigma) = eta, shape of ``sigma``, float32 or better."""
        return torch.full_like(at_least_float32(sigma), self.eta)


@dataclass(frozen=True)
class OdeDiffusion:
    """No noise: the transition is the Euler step of the flow's ODE and has no density."""

    kind: Literal["ode"] = field(default="ode", kw_only=True, repr=False)

    @property
    def has_density(self) -> bool:
        """Always False."""
        return False

    def __call__(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """g(sigma) = 0, shape of ``sigma``, float32 or better."""
        return torch.zeros_like(at_least_float32(sigma))


def _upcast_beside(scalar: Tensor, x: Tensor) -> Tensor:
    return beside(at_least_float32(scalar), x)


def predict_clean(x: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    r"""The image the velocity points at, if it were followed in a straight line.

    .. math:: \hat x_0 = x - \sigma v

    Exact for the straight path of one (image, noise) pair; for the optimal velocity it is the
    posterior mean of the image. The final image of a rollout is this prediction at the last
    grid point, so no noise is injected on the way to it.

    Args:
        x: State at ``sigma``, [B, *latent].
        velocity: dx/dsigma at ``x``, same shape.
        sigma: 0-dim, [B], or broadcastable to ``x``; in [0, 1].

    Returns:
        [B, *latent], float32 or better.
    """
    return at_least_float32(x) - _upcast_beside(sigma, x) * at_least_float32(velocity)


def predict_noise(x: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    r"""The noise the velocity comes from.

    .. math:: \hat x_1 = x + (1 - \sigma) v

    For the optimal velocity the score of the marginal at sigma is :math:`-\hat x_1 / \sigma`.

    Args:
        x: State at ``sigma``, [B, *latent].
        velocity: dx/dsigma at ``x``, same shape.
        sigma: 0-dim, [B], or broadcastable to ``x``; in [0, 1].

    Returns:
        [B, *latent], float32 or better.
    """
    return at_least_float32(x) + (1 - _upcast_beside(sigma, x)) * at_least_float32(velocity)


def transition(
    x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, diffusion: Tensor
) -> Gaussian:
    r"""One Euler-Maruyama step of the reverse SDE that shares the flow's marginals.

    .. math:: \mu = x - \Delta\,[v + \tfrac{g^2}{2\sigma}(x + (1-\sigma)v)],
              \qquad s = g\sqrt{\Delta}

    :math:`\Delta = \sigma - \sigma_{next}`; :math:`x + (1-\sigma)v` is the predicted noise. With
    the exact velocity the marginals are exact as :math:`\Delta \to 0` for any bounded g; g = 0 is
    the Euler ODE step, which has no density (whoever knows that g is 0 marks the result so, as
    :class:`Transition` does). Everything is computed in float32 or better whatever the network's
    dtype.

    Args:
        x: State at ``sigma``, [B, *latent].
        velocity: Predicted dx/dsigma at ``x``, same shape.
        sigma: In (0, 1]; 0-dim, [B], or broadcastable to ``x``.
        sigma_next: In [0, sigma); shaped like ``sigma`` (:mod:`.schedules` checks the order).
        diffusion: g(sigma) >= 0, latent units per sqrt(sigma); shaped like ``sigma``.

    Returns:
        Gaussian over the next state: mean like ``x``, std broadcastable to it.

    Reference: Flow-GRPO, arXiv:2505.05470, eq. 9; with constant g, DanceGRPO, arXiv:2505.07818.
    """
    sigma, sigma_next, diffusion = (
        _upcast_beside(each, x) for each in (sigma, sigma_next, diffusion)
    )
    x, velocity = at_least_float32(x), at_least_float32(velocity)
    dt = sigma - sigma_next
    drift = velocity + diffusion**2 / (2 * sigma) * predict_noise(x, velocity, sigma)
    return Gaussian(mean=x - dt * drift, std=diffusion * dt.sqrt())


class Kernel(Protocol):
    """A sampling step as rollout and training share it: :class:`Transition` and its like."""

    @property
    def has_density(self) -> bool:
        """Whether its steps have a density, and so can be trained."""
        ...

    def std(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """Standard deviation of the step that starts at ``sigma``, shape of ``sigma``."""
        ...

    def __call__(self, x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> Gaussian:
        """The Gaussian over the next state."""
        ...


@dataclass(frozen=True)
class Transition:
    """:func:`transition` with its diffusion coefficient bound.

    Rollout and training are handed the same object, so they cannot disagree about the policy.

    Attributes:
        diffusion: g(sigma).
    """

    diffusion: Diffusion

    @property
    def has_density(self) -> bool:
        """Whether its steps have a density, and so can be trained."""
        return self.diffusion.has_density

    def std(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """Standard deviation of the step, shape of ``sigma``, float32 or better."""
        dt = at_least_float32(sigma) - at_least_float32(sigma_next)
        return self.diffusion(sigma, sigma_next) * dt.sqrt()

    def __call__(self, x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> Gaussian:
        """The Gaussian over the next state; arguments as for :func:`transition`."""
        coefficient = self.diffusion(sigma, sigma_next)
        step = transition(x, velocity, sigma, sigma_next, coefficient)
        return replace(step, has_density=self.has_density)


@dataclass(frozen=True)
class CpsTransition(_NoiseLevel):
    r"""Flow-CPS: re-mix predicted image and noise so that the noise level is right at every step.

    .. math:: s = \sigma_{next} \sin(\eta\pi/2), \qquad
              \mu = (1 - \sigma_{next})\,\hat x_0 + \sqrt{\sigma_{next}^2 - s^2}\;\hat x_1

    An Euler-Maruyama step leaves more noise in the sample than sigma_next says, of second order
    in the step; here the coefficients of predicted and fresh noise have squares that sum to
    sigma_next^2 for any step length. eta = 0 is the ODE step. Where the predicted noise is not
    standard normal (any data but a single image) the marginal is only approximately that of the
    flow, and more steps do not mend it, since each draws the same share of the noise anew: the
    variance of Gaussian data tends to (1 + cos(eta pi / 2)) / 2 of what it should be.

    Attributes:
        eta: In [0, 1]; 0 is the ODE, 1 draws all noise anew.

    Reference: Flow-CPS, arXiv:2509.05952.
    """

    eta: float = 0.9
    kind: Literal["cps"] = field(default="cps", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        """Refuse a mixing angle outside [0, 90] degrees."""
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta is {self.eta}; Flow-CPS mixes noise with eta in [0, 1]; try 0.9")

    def std(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """Standard deviation of the step, shape of ``sigma``, float32 or better."""
        return at_least_float32(sigma_next) * math.sin(self.eta * math.pi / 2)

    def __call__(self, x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> Gaussian:
        """The Gaussian over the next state; arguments as for :func:`transition`."""
        std, after = _upcast_beside(self.std(sigma, sigma_next), x), _upcast_beside(sigma_next, x)
        kept = after * math.cos(self.eta * math.pi / 2)
        mean = (1 - after) * predict_clean(x, velocity, sigma)
        mean = mean + kept * predict_noise(x, velocity, sigma)
        return Gaussian(mean, std, has_density=self.has_density)


AnyTransition = FlowDiffusion | DanceDiffusion | CpsTransition | OdeDiffusion
"""What a run can choose its stochastic step from; see :func:`kernel_of`."""


def kernel_of(choice: AnyTransition) -> Kernel:
    """Return the sampling step of a choice: a diffusion coefficient becomes a :class:`Transition`.

    Args:
        choice: A diffusion coefficient, or a kernel of its own.

    Returns:
        The kernel that rollout and training share.
    """
    return choice if isinstance(choice, CpsTransition) else Transition(choice)
