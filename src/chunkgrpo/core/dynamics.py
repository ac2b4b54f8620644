# SPDX-License-Identifier: Apache-2.0
"""How fast a trajectory moves: one number per sample and step.

These curves are what the chunks are cut from: they depend on the step and hardly on the prompt,
and stretches of similar speed belong together. Along a *stochastic* trajectory they are
dominated by the injected noise, so their shape is mostly a property of the sampler: under
Flow-GRPO's coefficient they fall with the step, under DanceGRPO's they rise.

Axes: B samples, N trained steps.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .precision import at_least_float32

# Keeps an all-zero state from dividing by zero; far below the mean magnitude of any real one.
TINY = 1e-8


def _earlier_and_later(states: Tensor) -> tuple[Tensor, Tensor]:
    """[B, N+1, *latent] -> twice [B, N, D]."""
    if states.ndim < 3 or states.shape[1] < 2:
        raise ValueError(
            f"states have shape {tuple(states.shape)}; dynamics need [B, N+1, *latent] with "
            "N >= 1 and at least one latent axis; stack the visited states along axis 1"
        )
    flat = at_least_float32(states).flatten(start_dim=2)
    return flat[:, :-1], flat[:, 1:]


def relative_l1(states: Tensor) -> Tensor:
    r"""Relative L1 distance between consecutive states.

    .. math:: \frac{\lVert x_{i+1} - x_i \rVert_1}{\lVert x_i \rVert_1}

    Norms are means over the latent elements, with 1e-8 added to the denominator. x_i is the
    earlier, noisier state.

    Args:
        states: Visited states in sampling order, [B, N+1, *latent].

    Returns:
        [B, N] >= 0, dimensionless.

    Raises:
        ValueError: If ``states`` lacks an axis or a second state.

    Reference: Chunk-GRPO, arXiv:2510.21583, eq. 16.
    """
    earlier, later = _earlier_and_later(states)
    return (later - earlier).abs().mean(dim=2) / (earlier.abs().mean(dim=2) + TINY)


def relative_l2(states: Tensor) -> Tensor:
    r"""Relative L2 distance between consecutive states.

    .. math:: \frac{\lVert x_{i+1} - x_i \rVert_2}{\lVert x_i \rVert_2}

    Norms are root mean squares over the latent elements, with 1e-8 added to the denominator.

    Args:
        states: Visited states in sampling order, [B, N+1, *latent].

    Returns:
        [B, N] >= 0, dimensionless.

    Raises:
        ValueError: If ``states`` lacks an axis or a second state.

    Reference: Chunk-GRPO, arXiv:2510.21583, ablation of the distance measure.
    """
    earlier, later = _earlier_and_later(states)
    moved = (later - earlier).square().mean(dim=2).sqrt()
    return moved / (earlier.square().mean(dim=2).sqrt() + TINY)


def cosine_distance(states: Tensor) -> Tensor:
    r"""Cosine distance between consecutive states: how far the direction turned.

    .. math:: 1 - \frac{x_i \cdot x_{i+1}}{\lVert x_i \rVert_2 \lVert x_{i+1} \rVert_2}

    Blind to changes of length. The product and norms are means over the latent elements, with
    1e-8 added to each norm. Distances below about 1e-6 are rounding in float32.

    Args:
        states: Visited states in sampling order, [B, N+1, *latent].

    Returns:
        [B, N] in [0, 2] up to rounding, dimensionless.

    Raises:
        ValueError: If ``states`` lacks an axis or a second state.

    Reference: Chunk-GRPO, arXiv:2510.21583, ablation of the distance measure.
    """
    earlier, later = _earlier_and_later(states)
    earlier_length = earlier.square().mean(dim=2).sqrt() + TINY
    later_length = later.square().mean(dim=2).sqrt() + TINY
    return 1 - (earlier * later).mean(dim=2) / (earlier_length * later_length)


DISTANCES: dict[str, Callable[[Tensor], Tensor]] = {
    "l1": relative_l1,
    "l2": relative_l2,
    "cosine": cosine_distance,
}
"""The measures of speed that published ablations compare, by name: states to [B, N]."""


def mean_curve(curve_BN: Tensor) -> Tensor:
    """The batch's curve: the mean over samples.

    Chunks are cut from one shared curve, so that every sample and every process trains the same
    partition of time.

    Args:
        curve_BN: Per-sample curve, [B, N].

    Returns:
        [N], float32 or better.
    """
    return at_least_float32(curve_BN).mean(dim=0)
