# SPDX-License-Identifier: Apache-2.0
"""Which chunks of each sample are trained.

Axes: B samples, N trained steps, C chunks, M chosen chunks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Generator, Tensor

from .plackett_luce import plackett_luce_draw, plackett_luce_inclusion
from .plans import ChunkPlan
from .precision import COUNT_TOLERANCE, at_least_float32

# Keeps a chunk that did not move at all drawable; far below any real chunk's speed.
TINY_WEIGHT = 1e-8


def validate_fraction(fraction: float) -> None:
    if not 0 < fraction <= 1:
        raise ValueError(
            f"fraction is {fraction}; the trained share of the chunks must lie in (0, 1]; "
            "1.0 trains them all"
        )


def num_selected(num_chunks: int, fraction: float) -> int:
    r"""How many chunks of each sample are trained.

    .. math:: M = \max(1, \lfloor C \cdot f \rfloor)

    The product is floored up to rounding, so 0.3 of 10 is 3; and never below one, so that a
    sequence-level plan with fraction 0.5 still trains.

    Args:
        num_chunks: C >= 1.
        fraction: f in (0, 1]; 0.5 in the published runs.

    Returns:
        M in [1, C].

    Raises:
        ValueError: If ``fraction`` is outside (0, 1].
    """
    validate_fraction(fraction)
    return max(1, int(num_chunks * fraction + COUNT_TOLERANCE))


class Selection(Protocol):
    """Picks the chunks that each sample trains, and says how likely and how heavy each is.

    A curve is a sample's speed at each trained step, [B, N]; what a selection returns lies on the
    curve's device.
    """

    def __call__(self, plan: ChunkPlan, curve_BN: Tensor, generator: Generator) -> Tensor:
        """Distinct chunk indices, LongTensor [B, M]."""
        ...

    def inclusion(self, plan: ChunkPlan, curve_BN: Tensor) -> Tensor:
        """Probability that each chunk is picked, [B, C] float64, each row summing to M."""
        ...

    def loss_weights(self, plan: ChunkPlan, curve_BN: Tensor, chosen_BM: Tensor) -> Tensor:
        """Factor of each chunk's loss, [B, C] float32 > 0; those of unpicked chunks mean nothing.

        The sum over picked chunks is still divided by their number M, not by the sum of factors.
        """
        ...


def unit_weights(plan: ChunkPlan, curve_BN: Tensor) -> Tensor:
    """Loss weights of a selection that corrects nothing: ones, [B, C] float32."""
    plan.validate_for(curve_BN.shape[-1])
    return torch.ones(curve_BN.shape[0], plan.num_chunks, device=curve_BN.device)


def importance_weights(inclusion_BC: Tensor, num_drawn: int) -> Tensor:
    r"""Loss weights that undo an unequal choice of chunks.

    .. math:: w_j = \frac{M}{C\,\pi_j}, \qquad
              E\Big[\tfrac1M \sum_{j\,\text{chosen}} w_j L_j\Big] = \frac1C \sum_j L_j

    with :math:`\pi_j` the probability that chunk j is among the M chosen. The expected loss is
    that of uniform selection, exactly, whatever the probabilities; only its variance changes.
    A chunk that is always chosen weighs M / C, an equally likely one 1.

    Args:
        inclusion_BC: Probabilities in (0, 1], [B, C].
        num_drawn: M >= 1.

    Returns:
        [B, C] float32 > 0.

    Raises:
        ValueError: If a probability is 0: no weight makes up for a chunk that is never chosen.

    Reference: Horvitz and Thompson, Journal of the American Statistical Association 47 (1952).
    """
    if float(inclusion_BC.min()) <= 0:
        raise ValueError(
            f"the smallest inclusion probability is {float(inclusion_BC.min())}; a chunk that is "
            "never chosen cannot be corrected for; give every chunk a positive probability"
        )
    return (num_drawn / (inclusion_BC.shape[-1] * inclusion_BC)).float()


def chunk_weights(plan: ChunkPlan, curve_BN: Tensor, softmax: bool = False) -> Tensor:
    r"""Selection weight of each chunk: its share of the trajectory's speed.

    .. math:: w_j = \frac{\bar L_j + 10^{-8}}{\sum_k \bar L_k + 10^{-8}},
              \qquad \bar L_j = \tfrac{1}{cs_j}\sum_{i \in ch_j} L_i

    With ``softmax``, the softmax of the :math:`\bar L_j`, which is nearly uniform because
    these are all below 1.

    Args:
        plan: The chunks.
        curve_BN: Relative L1 speed of each sample and step, [B, N] >= 0.
        softmax: Use the softmax instead of the share.

    Returns:
        [B, C] > 0, each row summing to 1.

    Reference: Chunk-GRPO, arXiv:2510.21583, eq. 17.
    """
    speed_BC = plan.reduce(at_least_float32(curve_BN)) + TINY_WEIGHT
    if softmax:
        return speed_BC.softmax(dim=-1)
    return speed_BC / speed_BC.sum(dim=-1, keepdim=True)


@dataclass(frozen=True)
class UniformSelection:
    """Every chunk is equally likely, independently for each sample.

    Attributes:
        fraction: Share of the chunks that is trained, in (0, 1].
    """

    fraction: float = 0.5
    kind: Literal["uniform"] = field(default="uniform", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        """Refuse a share outside (0, 1]."""
        validate_fraction(self.fraction)

    def __call__(self, plan: ChunkPlan, curve_BN: Tensor, generator: Generator) -> Tensor:
        """Chunk indices [B, M]; the curve only says how many samples there are, and where."""
        plan.validate_for(curve_BN.shape[-1])
        keys_BC = torch.rand(
            curve_BN.shape[0], plan.num_chunks, generator=generator, device=curve_BN.device
        )
        return keys_BC.argsort(dim=1)[:, : num_selected(plan.num_chunks, self.fraction)]

    def inclusion(self, plan: ChunkPlan, curve_BN: Tensor) -> Tensor:
        """M / C for every chunk, [B, C] float64."""
        share = num_selected(plan.num_chunks, self.fraction) / plan.num_chunks
        return unit_weights(plan, curve_BN).double() * share

    def loss_weights(self, plan: ChunkPlan, curve_BN: Tensor, chosen_BM: Tensor) -> Tensor:
        """Ones, [B, C]: equally likely chunks need no correction."""
        return unit_weights(plan, curve_BN)


@dataclass(frozen=True)
class WeightedSelection:
    r"""Faster-moving chunks are likelier: drawn one after another without replacement.

    The order of the draws follows the Plackett-Luce distribution of :func:`chunk_weights`, and
    :func:`plackett_luce_inclusion` says how often each chunk is then trained. It favours high
    noise under Flow-GRPO's sampler and *low* noise under DanceGRPO's.

    As published, the gradient is not corrected for it: the selection then reweights noise levels.
    With ``correction``, :func:`importance_weights` keep the expected loss that of
    :class:`UniformSelection`, and only the sampling differs.

    Attributes:
        fraction: Share of the chunks that is trained, in (0, 1].
        softmax: Weights from a softmax instead of the share of speed.
        correction: Weigh the loss of a chosen chunk by the inverse of its probability.

    Reference: Chunk-GRPO, arXiv:2510.21583, eq. 17.
    """

    fraction: float = 0.5
    softmax: bool = False
    correction: bool = False
    kind: Literal["weighted"] = field(default="weighted", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        """Refuse a share outside (0, 1]."""
        validate_fraction(self.fraction)

    def __call__(self, plan: ChunkPlan, curve_BN: Tensor, generator: Generator) -> Tensor:
        """Chunk indices [B, M] in the order drawn."""
        weights_BC = chunk_weights(plan, curve_BN, self.softmax)
        num_drawn = num_selected(plan.num_chunks, self.fraction)
        return plackett_luce_draw(weights_BC, num_drawn, generator)

    def inclusion(self, plan: ChunkPlan, curve_BN: Tensor) -> Tensor:
        """Plackett-Luce probabilities of each sample's weights, [B, C] float64."""
        weights_BC = chunk_weights(plan, curve_BN, self.softmax)
        return plackett_luce_inclusion(weights_BC, num_selected(plan.num_chunks, self.fraction))

    def loss_weights(self, plan: ChunkPlan, curve_BN: Tensor, chosen_BM: Tensor) -> Tensor:
        """Ones, or with ``correction`` the inverse probabilities, [B, C]."""
        if not self.correction:
            return unit_weights(plan, curve_BN)
        return importance_weights(self.inclusion(plan, curve_BN), chosen_BM.shape[1])


@dataclass(frozen=True)
class ListedSelection:
    """Always the same chunks.

    Attributes:
        indices: Distinct chunk indices; 0 is the noisiest chunk.

    Reference: Chunk-GRPO, arXiv:2510.21583, single-chunk training.
    """

    indices: tuple[int, ...]
    kind: Literal["listed"] = field(default="listed", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        """Refuse an empty list, repeats and negative indices."""
        object.__setattr__(self, "indices", tuple(self.indices))
        distinct = len(set(self.indices)) == len(self.indices)
        if not self.indices or not distinct or min(self.indices) < 0:
            raise ValueError(
                f"chunk indices are {self.indices}; they must be distinct and >= 0, at least "
                "one; list each trained chunk once"
            )

    def __call__(self, plan: ChunkPlan, curve_BN: Tensor, generator: Generator) -> Tensor:
        """Chunk indices [B, M]; nothing is drawn from ``generator``."""
        plan.validate_for(curve_BN.shape[-1])
        if max(self.indices) >= plan.num_chunks:
            raise ValueError(
                f"chunk indices are {self.indices}, but the plan {plan} has chunks 0 to "
                f"{plan.num_chunks - 1}; list only these"
            )
        chosen_M = torch.tensor(self.indices, dtype=torch.long, device=curve_BN.device)
        return chosen_M.expand(curve_BN.shape[0], -1)

    def inclusion(self, plan: ChunkPlan, curve_BN: Tensor) -> Tensor:
        """1 for the listed chunks and 0 for the others, [B, C] float64."""
        chosen_BM = self(plan, curve_BN, Generator())
        return chosen_mask(chosen_BM, plan.num_chunks).double()

    def loss_weights(self, plan: ChunkPlan, curve_BN: Tensor, chosen_BM: Tensor) -> Tensor:
        """Ones, [B, C]: no weight stands in for the chunks that are never trained."""
        return unit_weights(plan, curve_BN)


def chosen_mask(chosen_BM: Tensor, num_chunks: int) -> Tensor:
    """Turn chunk indices into a mask.

    Args:
        chosen_BM: Chunk indices in [0, C), LongTensor [B, M].
        num_chunks: C.

    Returns:
        [B, C] bool, True where the chunk is trained.
    """
    mask_BC = torch.zeros(chosen_BM.shape[0], num_chunks, dtype=torch.bool, device=chosen_BM.device)
    return mask_BC.scatter(1, chosen_BM, True)
