# SPDX-License-Identifier: Apache-2.0
"""A choice of chunks that learns, while training, which of them are worth the network passes.

Each iteration the trainer measures how useful every chunk was (:func:`gradient_usefulness` or
:func:`reward_usefulness`), tells :class:`LearnedSelection`, and later iterations draw useful
chunks more often.

Axes: B samples, N trained steps, C chunks, M chosen chunks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from torch import Generator, Tensor

from .names import OneOf, check_name
from .plackett_luce import plackett_luce_draw, plackett_luce_inclusion
from .plans import ChunkPlan
from .precision import host_values
from .selection import importance_weights, num_selected, unit_weights


def gradient_usefulness(squared_norm_C: Tensor, evaluations_C: Tensor) -> Tensor:
    r"""Squared gradient norm that a chunk bought per network forward pass.

    .. math:: u_j = \frac{\lVert \sum_b \nabla L_{bj} \rVert^2}{E_j}

    The gradient is that of the chunk's loss summed over the samples that train it, before any
    correction of the selection. While the noise between samples dominates, the squared norm grows
    with their number, and u estimates :math:`E\lVert\nabla L_{bj}\rVert^2 / cs_j`.

    Args:
        squared_norm_C: Squared gradient norm of each chunk, [C] >= 0.
        evaluations_C: Network rows evaluated with gradient for each chunk, [C] >= 0.

    Returns:
        [C] float64 >= 0; NaN for a chunk that was not trained.

    Raises:
        ValueError: If the shapes differ.
    """
    if squared_norm_C.shape != evaluations_C.shape:
        raise ValueError(
            f"squared norms have shape {tuple(squared_norm_C.shape)} and evaluations "
            f"{tuple(evaluations_C.shape)}; both need one value per chunk, [C]"
        )
    evaluations_C = evaluations_C.double()
    measured = squared_norm_C.double() / evaluations_C.clamp(min=1)
    return torch.where(evaluations_C > 0, measured, math.nan)


def reward_usefulness(log_ratio_BC: Tensor, advantages: Tensor, mask_BC: Tensor) -> Tensor:
    r"""Reward gained through a chunk per network forward pass, to first order.

    .. math:: u_j = \frac{1}{|S_j|}\sum_{b \in S_j} A_b \log s_{bj}

    The policy's move changes the expected reward, in units of its spread, by
    :math:`E[A(\rho - 1)]`, of which chunk j has :math:`\rho_j = s_j^{D\,cs_j}` with s the
    per-dimension ratio: to first order :math:`D\,cs_j\,E[A \log s_j]`. Divided by the chunk's
    :math:`cs_j` passes, and without the constant D, this is u.

    Honest only on samples that the move was *not* trained on, such as those of a later update of
    the same rollout: on its own samples every update looks useful.

    Args:
        log_ratio_BC: Log-ratio of each chunk after the move
            (:func:`~chunkgrpo.core.ratios.chunk_log_ratio`), [B, C].
        advantages: [B], or [B, C] where credit differs by chunk.
        mask_BC: The (sample, chunk) pairs to average over, bool [B, C].

    Returns:
        [C] float64 of any sign; NaN for a chunk without a pair.

    Raises:
        ValueError: If the shapes do not fit.
    """
    shape = log_ratio_BC.shape
    if mask_BC.shape != shape or advantages.shape not in (shape, shape[:1]):
        raise ValueError(
            f"log-ratios have shape {tuple(shape)}, the mask {tuple(mask_BC.shape)} and the "
            f"advantages {tuple(advantages.shape)}; they need [B, C], [B, C] and [B] or [B, C]"
        )
    per_chunk = advantages if advantages.ndim == 2 else advantages[:, None]
    gain_BC = (per_chunk.double() * log_ratio_BC.double()).where(mask_BC, 0.0)
    pairs_C = mask_BC.sum(dim=0)
    return torch.where(pairs_C > 0, gain_BC.sum(dim=0) / pairs_C.clamp(min=1), math.nan)


USEFULNESS = {"gradient": 0.5, "reward": 1.0}
"""What a chunk is judged by -> the power that its average enters the probabilities with."""


@dataclass(frozen=True)
class Learned:
    """The settings of a :class:`LearnedSelection`, which has a state.

    Attributes:
        fraction: Share of the chunks that is trained, in (0, 1].
        floor: Share of the draws that is uniform whatever was learned, in (0, 1]; 1 learns nothing.
        decay: EMA decay of the usefulness estimate, in [0, 1).
        usefulness: What a chunk is judged by.
        correction: Weigh the loss of a chosen chunk by the inverse of its probability.
    """

    fraction: float = 0.5
    floor: float = 0.2
    decay: float = 0.9
    usefulness: Annotated[str, OneOf(USEFULNESS)] = "gradient"
    correction: bool = False
    kind: Literal["learned"] = field(default="learned", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        """Refuse values outside their ranges."""
        check_name("usefulness", self.usefulness, USEFULNESS)
        self.make()

    def make(self) -> LearnedSelection:
        """Return a selection that has learned nothing yet."""
        power = USEFULNESS[self.usefulness]
        return LearnedSelection(
            self.fraction, self.floor, self.decay, power, self.correction, self.usefulness
        )


@dataclass
class LearnedSelection:
    r"""Chunks that proved useful are likelier: drawn one after another without replacement.

    .. math:: p_j = (1 - \varphi)\,\frac{\max(\bar u_j, 0)^\alpha}{\sum_k \max(\bar u_k, 0)^\alpha}
              + \frac{\varphi}{C}

    with :math:`\bar u_j` the exponential average of the usefulness observed so far, corrected for
    its start, and :math:`\varphi` the floor: every chunk keeps :math:`p_j \ge \varphi / C`. A chunk
    not yet observed counts as the mean of those that are. All chunks are equally likely before
    the first observation, and while none was of any use. All samples share the probabilities.

    Without ``correction`` the loss shifts towards the chunks that are drawn more often. With it
    (:func:`~.selection.importance_weights`) the expected loss stays that of uniform selection, and
    the learned probabilities lower the variance of its gradient at a given cost:
    for squared gradient norms :math:`G_j^2` and cost :math:`cs_j`, the variance
    :math:`\sum_j G_j^2/\pi_j` at the cost :math:`\sum_j \pi_j cs_j` is least at
    :math:`\pi_j \propto \sqrt{G_j^2/cs_j}`: power 1/2 of :func:`gradient_usefulness`.

    This is the one object of ``core`` with a state. Where several processes train one policy, all
    must observe the same (averaged) values.

    Attributes:
        fraction: Share of the chunks that is trained, in (0, 1].
        floor: Share of the draws that is uniform whatever was learned, in (0, 1]; 1 learns nothing.
        decay: Of the exponential average per observation, in [0, 1).
        power: Exponent of the usefulness, > 0; 1/2 for squared gradient norms.
        correction: Weigh the loss of a chosen chunk by the inverse of its probability.
        usefulness: What the observations measure, ``"gradient"`` or ``"reward"``.

    Reference: for the power 1/2, optimal (Neyman) allocation with costs: Cochran, Sampling
    Techniques (1977), section 5.5.
    """

    fraction: float = 0.5
    floor: float = 0.2
    decay: float = 0.9
    power: float = 0.5
    correction: bool = False
    usefulness: str = "gradient"
    _sum_C: Tensor | None = field(default=None, init=False, repr=False, compare=False)
    _mass_C: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse values outside their ranges."""
        num_selected(1, self.fraction)
        if not 0 < self.floor <= 1:
            raise ValueError(
                f"floor is {self.floor}; the uniform share of the draws must lie in (0, 1], or a "
                "chunk could never be drawn again; 0.2 is a fair start"
            )
        if not 0 <= self.decay < 1:
            raise ValueError(
                f"decay is {self.decay}; that of the exponential average must lie in [0, 1); "
                "0.9 averages over about ten observations"
            )
        if not (math.isfinite(self.power) and self.power > 0):
            raise ValueError(
                f"power is {self.power}; the exponent of the usefulness must be positive and "
                "finite; use 0.5 for squared gradient norms and 1 for reward gains"
            )

    def observe(self, chunk_usefulness_C: Tensor) -> None:
        """Take in how useful each chunk was in one iteration.

        Args:
            chunk_usefulness_C: [C], any finite values; NaN where a chunk was not measured, which
                leaves its average as it was.

        Raises:
            ValueError: If it is not one value per chunk, an entry is infinite, or the number of
                chunks changed.
        """
        value_C = chunk_usefulness_C.detach().double().cpu()
        if value_C.ndim != 1 or not len(value_C) or value_C.isinf().any():
            raise ValueError(
                f"usefulness is {host_values(value_C)}; it must be one finite value per chunk, "
                "[C], or NaN where a chunk was not measured"
            )
        if self._sum_C is None or self._mass_C is None:
            self._sum_C, self._mass_C = torch.zeros_like(value_C), torch.zeros_like(value_C)
        self._check(len(value_C))
        seen_C = ~value_C.isnan()
        keep = self.decay
        updated_C = keep * self._sum_C + (1 - keep) * value_C
        self._sum_C = torch.where(seen_C, updated_C, self._sum_C)
        self._mass_C = torch.where(seen_C, keep * self._mass_C + (1 - keep), self._mass_C)

    def probabilities(self, num_chunks: int) -> Tensor:
        """Return the drawing weights p.

        Args:
            num_chunks: C, the number observed where anything was.

        Returns:
            [C] float64 on the CPU, at least floor / C each, summing to 1.

        Raises:
            ValueError: If the observations were of another number of chunks.
        """
        uniform_C = torch.full((num_chunks,), 1 / num_chunks, dtype=torch.float64)
        if self._sum_C is None or self._mass_C is None:
            return uniform_C
        self._check(num_chunks)
        known_C = self._mass_C > 0
        if not known_C.any():
            return uniform_C
        average_C = (self._sum_C / self._mass_C.clamp(min=1e-300)).clamp(min=0)
        average_C = torch.where(known_C, average_C, average_C[known_C].mean())
        largest = average_C.max()
        if largest == 0:
            return uniform_C
        # Divided by the largest first, so that no power of a tiny or huge unit over- or underflows.
        merit_C = (average_C / largest) ** self.power
        return (1 - self.floor) * merit_C / merit_C.sum() + self.floor * uniform_C

    def state(self) -> dict[str, list[float]]:
        """Return what was learned, as JSON can hold it; empty before the first observation."""
        if self._sum_C is None or self._mass_C is None:
            return {}
        return {"sum": host_values(self._sum_C), "mass": host_values(self._mass_C)}

    def load(self, state: Mapping[str, Sequence[float]]) -> None:
        """Take over what :meth:`state` returned, exactly.

        Raises:
            ValueError: If it is not such a state.
        """
        if not state:
            self._sum_C = self._mass_C = None
            return
        lengths = {len(values) for values in state.values()}
        if set(state) != {"sum", "mass"} or len(lengths) != 1:
            raise ValueError(
                f"the state holds {sorted(state)} of lengths {sorted(lengths)}; a learned "
                "selection saves 'sum' and 'mass', one value per chunk each; load what state() "
                "returned"
            )
        self._sum_C, self._mass_C = (
            torch.tensor(list(state[name]), dtype=torch.float64) for name in ("sum", "mass")
        )

    def __call__(self, plan: ChunkPlan, curve_BN: Tensor, generator: Generator) -> Tensor:
        """Chunk indices [B, M] in the order drawn; of the curve only the shape matters."""
        num_drawn = num_selected(plan.num_chunks, self.fraction)
        return plackett_luce_draw(self._weights(plan, curve_BN), num_drawn, generator)

    def inclusion(self, plan: ChunkPlan, curve_BN: Tensor) -> Tensor:
        """Plackett-Luce probabilities, the same for all samples, [B, C] float64."""
        num_drawn = num_selected(plan.num_chunks, self.fraction)
        # One row is enough work: all are alike.
        row_1C = plackett_luce_inclusion(self._weights(plan, curve_BN)[:1], num_drawn)
        return row_1C.expand(curve_BN.shape[0], -1)

    def loss_weights(self, plan: ChunkPlan, curve_BN: Tensor, chosen_BM: Tensor) -> Tensor:
        """Ones, or with ``correction`` the inverse probabilities, [B, C].

        Of the probabilities as they are now: ask before the next :meth:`observe`.
        """
        if not self.correction:
            return unit_weights(plan, curve_BN)
        return importance_weights(self.inclusion(plan, curve_BN), chosen_BM.shape[1])

    def _weights(self, plan: ChunkPlan, curve_BN: Tensor) -> Tensor:
        """Drawing weights, one row a sample, [B, C]."""
        plan.validate_for(curve_BN.shape[-1])
        weights_C = self.probabilities(plan.num_chunks).to(curve_BN.device)
        return weights_C.expand(curve_BN.shape[0], -1)

    def _check(self, num_chunks: int) -> None:
        assert self._sum_C is not None
        if len(self._sum_C) != num_chunks:
            raise ValueError(
                f"{num_chunks} chunks, but {len(self._sum_C)} were observed so far; a learned "
                "selection belongs to one plan; keep the plan, or start with a new selection"
            )
