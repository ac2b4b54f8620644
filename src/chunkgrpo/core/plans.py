# SPDX-License-Identifier: Apache-2.0
"""Where time is cut: a partition of the trained steps into consecutive chunks.

One chunk is one importance ratio and one clipping decision: chunks of one step are step-level GRPO,
one chunk of all steps is its sequence-level relative, and what lies between is Chunk-GRPO. Here are
the plan itself and those that need no measurement; :mod:`.measured_plans` cuts a measured curve,
and :mod:`.plan_rules` names them all.

Axes: B samples, N trained steps, C chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

PAPER_SIZES = (2, 3, 4, 7)
"""Chunk sizes of the published runs: 17 sampler steps, 16 of them trained."""


def _is_size(size: object) -> bool:
    return isinstance(size, int) and not isinstance(size, bool) and size >= 1


@dataclass(frozen=True)
class ChunkPlan:
    """A partition of the trained steps into consecutive chunks.

    Attributes:
        sizes: Steps per chunk, each >= 1, in sampling order: the first chunk is the noisiest.
    """

    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        """Refuse an empty plan and chunks without steps."""
        object.__setattr__(self, "sizes", tuple(self.sizes))
        if not self.sizes or not all(_is_size(size) for size in self.sizes):
            raise ValueError(
                f"chunk sizes are {self.sizes}; a plan needs at least one chunk, and every size "
                "must be an integer >= 1; remove the offending entry"
            )

    def __str__(self) -> str:
        """The sizes as a list, ``[2, 3, 4, 7]``."""
        return str(list(self.sizes))

    @property
    def num_steps(self) -> int:
        """N, the number of steps covered."""
        return sum(self.sizes)

    @property
    def num_chunks(self) -> int:
        """C, the number of chunks."""
        return len(self.sizes)

    @property
    def starts(self) -> tuple[int, ...]:
        """Index of each chunk's first step."""
        return tuple(accumulate(self.sizes[:-1], initial=0))

    @property
    def chunk_of_step(self) -> Tensor:
        """Index of the chunk that holds each step, LongTensor [N] on the CPU."""
        return torch.repeat_interleave(torch.arange(self.num_chunks), torch.tensor(self.sizes))

    def steps_of(self, chunk: int) -> range:
        """Indices of the steps in one chunk.

        Args:
            chunk: In [0, C).

        Returns:
            A range of step indices.

        Raises:
            ValueError: If there is no such chunk.
        """
        if not 0 <= chunk < self.num_chunks:
            raise ValueError(
                f"chunk {chunk} was asked of the plan {self}, which has chunks 0 to "
                f"{self.num_chunks - 1}; pick one of these"
            )
        return range(self.starts[chunk], self.starts[chunk] + self.sizes[chunk])

    def reduce(self, values_BN: Tensor) -> Tensor:
        """Average over the steps of each chunk.

        A chunk of one step returns that step's value to the last bit.

        Args:
            values_BN: One value per step, [..., N].

        Returns:
            One value per chunk, [..., C].

        Raises:
            ValueError: If the last axis is not N long.
        """
        self.validate_for(values_BN.shape[-1])
        parts = torch.split(values_BN, list(self.sizes), -1)
        return torch.stack([part.mean(dim=-1) for part in parts], -1)

    def expand(self, values_BC: Tensor) -> Tensor:
        """Give every step its chunk's value: the adjoint of :meth:`reduce`, times the size.

        Args:
            values_BC: One value per chunk, [..., C].

        Returns:
            One value per step, [..., N].

        Raises:
            ValueError: If the last axis is not C long.
        """
        if values_BC.shape[-1] != self.num_chunks:
            raise ValueError(
                f"values of shape {tuple(values_BC.shape)} were given to the plan {self}; their "
                f"last axis must hold its {self.num_chunks} chunks; reduce them with this plan"
            )
        columns = torch.split(values_BC, 1, dim=-1)
        return torch.cat(
            [
                column.expand(*column.shape[:-1], size)
                for column, size in zip(columns, self.sizes, strict=True)
            ],
            dim=-1,
        )

    def validate_for(self, num_trained: int) -> ChunkPlan:
        """Check that the plan covers a schedule's trained steps, and hand it back.

        Args:
            num_trained: N of the schedule; the last sampler step is not trained.

        Returns:
            The plan itself.

        Raises:
            ValueError: If the sizes do not sum to ``num_trained``.
        """
        if self.num_steps != num_trained:
            too_many = self.num_steps > num_trained
            fix = "shrink a chunk or raise" if too_many else "grow a chunk or lower"
            raise ValueError(
                f"chunk sizes {self.sizes} sum to {self.num_steps}, but this schedule has "
                f"{num_trained} trained steps; {fix} num_steps"
            )
        return self


def explicit_plan(sizes: Sequence[int], num_trained: int) -> ChunkPlan:
    """The plan with the given sizes.

    Args:
        sizes: Steps per chunk, summing to ``num_trained``.
        num_trained: N >= 1.

    Returns:
        The plan.

    Raises:
        ValueError: If a size is not a positive integer or the sum is not N.
    """
    return ChunkPlan(tuple(sizes)).validate_for(num_trained)


def equal_plan(size: int, num_trained: int) -> ChunkPlan:
    """Chunks of ``size`` steps; what is left over becomes one smaller chunk at the end.

    Args:
        size: Steps per chunk, in [1, N].
        num_trained: N >= 1.

    Returns:
        The plan.

    Raises:
        ValueError: If ``size`` is outside [1, N].

    Reference: Chunk-GRPO, arXiv:2510.21583, ablation of the chunk size.
    """
    if not 1 <= size <= num_trained:
        raise ValueError(
            f"the chunk size is {size}; equal chunks of a schedule with {num_trained} trained "
            f"steps have 1 to {num_trained} steps; choose a size in that range"
        )
    whole, rest = divmod(num_trained, size)
    return explicit_plan([size] * whole + [rest] * (rest > 0), num_trained)


def step_plan(num_trained: int) -> ChunkPlan:
    """Every step its own chunk: step-level GRPO.

    Args:
        num_trained: N >= 1.

    Returns:
        The plan [1, 1, ..., 1].

    Reference: Flow-GRPO, arXiv:2505.05470; DanceGRPO, arXiv:2505.07818.
    """
    return explicit_plan([1] * num_trained, num_trained)


def whole_plan(num_trained: int) -> ChunkPlan:
    """All steps one chunk: the sequence-level, geometric-mean ratio.

    Args:
        num_trained: N >= 1.

    Returns:
        The plan [N].

    Reference: the flow-matching counterpart of GSPO, arXiv:2507.18071.
    """
    return explicit_plan([num_trained], num_trained)


def paper_plan(num_trained: int) -> ChunkPlan:
    """The published chunks, [2, 3, 4, 7].

    Args:
        num_trained: Must be 16, i.e. a schedule of 17 sampler steps.

    Returns:
        The plan.

    Raises:
        ValueError: For any other schedule; the list was read off that one schedule's curve.

    Reference: Chunk-GRPO, arXiv:2510.21583, section 5.1.
    """
    if num_trained != sum(PAPER_SIZES):
        raise ValueError(
            f"the published chunks {list(PAPER_SIZES)} cover 16 trained steps, but this schedule "
            f"has {num_trained}; set num_steps to 17, or cut this schedule's own curve with "
            "adaptive_plan or optimal_plan"
        )
    return explicit_plan(PAPER_SIZES, num_trained)


def restrict_plan(plan: ChunkPlan, window: range) -> ChunkPlan:
    """Return the chunks of a plan over all steps that make up a window.

    Args:
        plan: Partition of all N steps.
        window: Consecutive steps.

    Raises:
        ValueError: If a chunk lies across an edge of the window: some of its steps would have no
            density.
    """
    edges = {0, *(start for start in plan.starts), plan.num_steps}
    for edge in (window.start, window.stop):
        if edge not in edges:
            raise ValueError(
                f"a chunk of {plan} lies across the edge of the window of steps {window.start} to "
                f"{window.stop - 1}; beyond it steps follow the ODE and have no density; end a "
                f"chunk at step {edge}"
            )
    sizes = [
        size
        for size, start in zip(plan.sizes, plan.starts, strict=True)
        if window.start <= start < window.stop
    ]
    return ChunkPlan(tuple(sizes))
