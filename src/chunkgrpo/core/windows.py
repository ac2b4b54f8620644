# SPDX-License-Identifier: Apache-2.0
"""Which steps of an iteration are stochastic, stored and trained: a window that may move.

A window is a ``range`` of the N trainable steps. Outside it sampling follows the ODE, so those
steps have no density and cannot be trained. All samples of an iteration share one window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator

from .chunks import ChunkPlan


class WindowSchedule(Protocol):
    """Chooses the window of each iteration."""

    def __call__(self, iteration: int, generator: Generator) -> range:
        """Return the window of an iteration, counted from 0."""
        ...


def _validate_window(start: int, size: int, num_trained: int) -> None:
    if size < 1 or start < 0 or start + size > num_trained:
        raise ValueError(
            f"a window of {size} steps from step {start} does not lie in the {num_trained} trained "
            f"steps; start must be in [0, {max(0, num_trained - size)}]; shrink or move it"
        )


@dataclass(frozen=True)
class AllSteps:
    """Every trainable step, always.

    Attributes:
        num_trained: N.
    """

    num_trained: int

    def __call__(self, iteration: int, generator: Generator) -> range:
        """Return 0..N-1."""
        return range(self.num_trained)


@dataclass(frozen=True)
class FixedWindow:
    """The same window always.

    Attributes:
        start, size: First step and number of steps.
        num_trained: N.
    """

    start: int
    size: int
    num_trained: int

    def __post_init__(self) -> None:
        """Refuse a window that leaves the trained steps."""
        _validate_window(self.start, self.size, self.num_trained)

    def __call__(self, iteration: int, generator: Generator) -> range:
        """Return the window."""
        return range(self.start, self.start + self.size)

    def places(self) -> dict[int, float]:
        """Return the one start."""
        return {self.start: 1.0}


@dataclass(frozen=True)
class RandomWindow:
    """A window whose start is drawn anew, uniformly, every iteration.

    Attributes:
        size: Number of steps.
        num_trained: N.
        low, high: The window lies within steps low..high-1; ``high`` None means N.

    Reference: Flow-GRPO-Fast, whose range is the first half of the steps; the "random" strategy of
    MixGRPO, arXiv:2507.21802, section 4.
    """

    size: int
    num_trained: int
    low: int = 0
    high: int | None = None

    def __post_init__(self) -> None:
        """Refuse a range that leaves the trained steps or cannot hold the window."""
        _validate_window(self.low, self.size, self.num_trained)
        if self.stop > self.num_trained or self.low + self.size > self.stop:
            raise ValueError(
                f"a window of {self.size} steps is to lie in steps {self.low} to {self.stop - 1} "
                f"of {self.num_trained} trained steps; high must be in "
                f"[{self.low + self.size}, {self.num_trained}]; change it or shrink the window"
            )

    @property
    def stop(self) -> int:
        """``high``, or N where it is None."""
        return self.num_trained if self.high is None else self.high

    def places(self) -> dict[int, float]:
        """Return every start, all equally likely."""
        starts = range(self.low, self.stop - self.size + 1)
        return {start: 1 / len(starts) for start in starts}

    def __call__(self, iteration: int, generator: Generator) -> range:
        """Draw the window."""
        choices = self.stop - self.size - self.low + 1
        start = self.low + int(torch.randint(choices, (), generator=generator))
        return range(start, start + self.size)


@dataclass(frozen=True)
class SlidingWindow:
    r"""A window that starts at the highest noise and moves on, and begins again after the end.

    The window starts at 0, and after :math:`\tau(l)` iterations at start l it moves by ``stride``;
    its last start is N - size. How long it stays is

    - ``constant``: :math:`\tau`;
    - ``linear``: :math:`\lceil \tau (1 - l / N) \rceil`;
    - ``exponential``: :math:`\lceil \tau e^{-k \max(0, l - l_0)} \rceil`.

    Attributes:
        size: Number of steps.
        num_trained: N.
        every: tau >= 1, iterations at the first position.
        stride: Steps that it moves by.
        decay: One of the three names above.
        rate: k > 0 of the exponential decay; 0.1 published.
        after: l_0 of the exponential decay, before the last start; 13 published, of 25 steps.

    Reference: MixGRPO, arXiv:2507.21802, section 4 ("progressive", "decay"). Published code lets
    the window run over the end, where it shrinks and may become empty; this one stops there.
    """

    size: int
    num_trained: int
    every: int = 25
    stride: int = 1
    decay: str = "constant"
    rate: float = 0.1
    after: int = 13

    def __post_init__(self) -> None:
        """Refuse what cannot move."""
        _validate_window(0, self.size, self.num_trained)
        if self.every < 1 or self.stride < 1:
            raise ValueError(
                f"the window stays {self.every} iterations and moves by {self.stride}; both must "
                "be at least 1"
            )
        if self.decay not in ("constant", "linear", "exponential"):
            raise ValueError(
                f"the window's decay is {self.decay!r}; known: constant, linear, exponential"
            )
        if self.decay != "exponential":
            return
        if not self.rate > 0:
            raise ValueError(
                f"the rate of the exponential decay is {self.rate}; it must be above 0, or the "
                "stays do not shorten; 0.1 is the published one"
            )
        if self.starts()[-1] <= self.after:
            raise ValueError(
                f"the exponential decay shortens the stays at starts after step {self.after}, and "
                f"a window of {self.size} in {self.num_trained} trained steps starts at "
                f"{self.starts()[-1]} at the latest, so nothing would decay; set after below "
                f"{self.starts()[-1]}"
            )

    def stays(self, start: int) -> int:
        """Return the iterations spent at a start."""
        if self.decay == "linear":
            # In integers: 7 * (1 - 6 / 7) is 1.0000000000000002 in floating point.
            return -(-self.every * (self.num_trained - start) // self.num_trained)
        if self.decay == "exponential":
            return math.ceil(self.every * math.exp(-self.rate * max(0, start - self.after)))
        return self.every

    def starts(self) -> list[int]:
        """Return every start of one pass, in order."""
        last = self.num_trained - self.size
        starts = list(range(0, last + 1, self.stride))
        return starts if starts[-1] == last else [*starts, last]

    def places(self) -> dict[int, float]:
        """Return every start with its share of one pass."""
        stays = {start: self.stays(start) for start in self.starts()}
        return {start: stay / sum(stays.values()) for start, stay in stays.items()}

    def __call__(self, iteration: int, generator: Generator) -> range:
        """Return the window of an iteration; nothing is drawn."""
        one_pass = [start for start in self.starts() for _ in range(self.stays(start))]
        start = one_pass[iteration % len(one_pass)]
        return range(start, start + self.size)


@dataclass(frozen=True)
class ChunkWindow:
    """One chunk of a plan: the samples of a group branch where it begins.

    With the ODE outside and a group that starts from one noise, only the chunk's own noise tells
    the group's images apart, and its reward differences are due to that chunk alone.

    Attributes:
        plan: Partition of all N steps.
        indices: Chunks to draw from; all where empty.

    Reference: TempFlow-GRPO, arXiv:2508.04324, section 3 (chunks of one); the chunk form is this
    library's.
    """

    plan: ChunkPlan
    indices: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuse a chunk that the plan does not have."""
        for index in self.indices:
            if not 0 <= index < self.plan.num_chunks:
                raise ValueError(
                    f"branching at chunk {index}, but the plan {self.plan} has chunks 0 to "
                    f"{self.plan.num_chunks - 1}"
                )

    def __call__(self, iteration: int, generator: Generator) -> range:
        """Draw a chunk uniformly."""
        choices = self.indices or tuple(range(self.plan.num_chunks))
        pick = int(torch.randint(len(choices), (), generator=generator))
        return self.plan.steps_of(choices[pick])


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
