# SPDX-License-Identifier: Apache-2.0
"""Weights of steps: inside a chunk's ratio (inner) and of its loss (outer).

Axes: N trained steps, C chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from torch import Tensor

from .names import ByKind
from .plans import ChunkPlan
from .precision import at_least_float32


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


# --- the choices of a run for the weights of a loss ---------------------------------------------


class _OuterWeights:
    """What all of them share."""

    def check(self, plan: ChunkPlan) -> None:
        """Accept every plan."""


@dataclass(frozen=True)
class NoOuterWeights(_OuterWeights):
    """Every loss counts alike."""

    kind: Literal["none"] = field(default="none", kw_only=True, repr=False)

    def __call__(self, std_N: Tensor, dt_N: Tensor, window: slice, plan: ChunkPlan) -> Tensor:
        """Return the weights of the window's steps.

        Args:
            std_N: Standard deviation of every trainable step, [N].
            dt_N: Length of every trainable step, [N].
            window: The steps that are trained.
            plan: The chunks of the window.

        Returns:
            One weight per step of the window.
        """
        return torch.ones_like(std_N)[window]


@dataclass(frozen=True)
class NoiseLevelWeights(_OuterWeights):
    """:func:`noise_level_weights`, with mean 1 over all trainable steps."""

    kind: Literal["noise_level"] = field(default="noise_level", kw_only=True, repr=False)

    def __call__(self, std_N: Tensor, dt_N: Tensor, window: slice, plan: ChunkPlan) -> Tensor:
        """Return the weights of the window's steps."""
        return noise_level_weights(std_N)[window]


@dataclass(frozen=True)
class InverseDtWeights(_OuterWeights):
    """:func:`inverse_dt_weights`."""

    kind: Literal["inverse_dt"] = field(default="inverse_dt", kw_only=True, repr=False)

    def __call__(self, std_N: Tensor, dt_N: Tensor, window: slice, plan: ChunkPlan) -> Tensor:
        """Return the weights of the window's steps."""
        return inverse_dt_weights(dt_N)[window]


@dataclass(frozen=True)
class ChunkSizeWeights(_OuterWeights):
    """:func:`chunk_size_weights`: steps of unequal chunks count alike."""

    kind: Literal["chunk_size"] = field(default="chunk_size", kw_only=True, repr=False)

    def __call__(self, std_N: Tensor, dt_N: Tensor, window: slice, plan: ChunkPlan) -> Tensor:
        """Return the weights of the window's steps."""
        return chunk_size_weights(plan).to(std_N)


@dataclass(frozen=True)
class ImplicitWeights(_OuterWeights):
    """:func:`implicit_weights`: single steps get the weights that they would have in chunks.

    Attributes:
        sizes: Of the chunks that are imitated; they cover the planned steps.
    """

    sizes: tuple[int, ...]
    kind: Literal["implicit"] = field(default="implicit", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        """Refuse an empty plan and chunks without steps."""
        object.__setattr__(self, "sizes", ChunkPlan(tuple(self.sizes)).sizes)

    def check(self, plan: ChunkPlan) -> None:
        """Refuse a plan of chunks, and one of other steps.

        Raises:
            ValueError: With the plan.
        """
        ChunkPlan(self.sizes).validate_for(plan.num_steps)
        if max(plan.sizes) > 1:
            raise ValueError(
                f"outer weighting 'implicit' gives single steps the weights that chunks have "
                f"anyhow, and the plan is {plan}; use chunks of one, or no weights"
            )

    def __call__(self, std_N: Tensor, dt_N: Tensor, window: slice, plan: ChunkPlan) -> Tensor:
        """Return the weights of the window's steps."""
        return implicit_weights(ChunkPlan(self.sizes)).to(std_N)


AnyOuterWeights = Annotated[
    NoOuterWeights | NoiseLevelWeights | InverseDtWeights | ChunkSizeWeights | ImplicitWeights,
    ByKind(),
]
"""What a run can choose the weights of its loss from."""
