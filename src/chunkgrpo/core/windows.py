# SPDX-License-Identifier: Apache-2.0
"""Which steps of an iteration are stochastic, stored and trained: a window that may move.

A window is a ``range`` of the N trainable steps. Outside it sampling follows the ODE, so those
steps have no density and cannot be trained. All samples of an iteration share one window.

Axes: N trained steps.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Annotated, Literal, Protocol

import torch
from torch import Generator

from .names import OneOf, check_name
from .plans import ChunkPlan, restrict_plan


class WindowSchedule(Protocol):
    """Chooses the window of each iteration."""

    def num_planned(self, num_trained: int) -> int:
        """Return how many steps the chunk plan covers.

        Raises:
            ValueError: If the window does not lie in the N trained steps.
        """
        ...

    def choose(
        self, iteration: int, plan: ChunkPlan, num_trained: int, generator: Generator
    ) -> tuple[range, ChunkPlan]:
        """Return the window of an iteration, counted from 0, and the chunks within it."""
        ...

    def places(self, plan: ChunkPlan, num_trained: int) -> dict[WindowSchedule, float]:
        """Return windows that stay, each with the share of the iterations that have it."""
        ...


def _validate_window(start: int, size: int, num_trained: int) -> None:
    if size < 1 or start < 0 or start + size > num_trained:
        raise ValueError(
            f"a window of {size} steps from step {start} does not lie in the {num_trained} trained "
            f"steps; start must be in [0, {max(0, num_trained - size)}]; shrink or move it"
        )


@dataclass(frozen=True)
class AllSteps:
    """Every trainable step, always."""

    kind: Literal["all"] = field(default="all", kw_only=True, repr=False)

    def num_planned(self, num_trained: int) -> int:
        """Return N."""
        return num_trained

    def choose(
        self, iteration: int, plan: ChunkPlan, num_trained: int, generator: Generator
    ) -> tuple[range, ChunkPlan]:
        """Return all steps and the whole plan."""
        return range(num_trained), plan

    def places(self, plan: ChunkPlan, num_trained: int) -> dict[WindowSchedule, float]:
        """Return itself."""
        return {self: 1.0}


@dataclass(frozen=True)
class _SizedWindow(ABC):
    """What windows of a given number of steps share: the plan covers the window."""

    size: int = 4

    def __post_init__(self) -> None:
        """Refuse an empty window."""
        if self.size < 1:
            raise ValueError(f"size is {self.size}; a window has at least 1 step")

    @abstractmethod
    def starts_of(self, num_trained: int) -> Mapping[int, float]:
        """Return every first step, with the share of the iterations that begin there."""
        ...

    @abstractmethod
    def start_at(self, iteration: int, num_trained: int, generator: Generator) -> int:
        """Return the first step of an iteration's window."""
        ...

    def num_planned(self, num_trained: int) -> int:
        """Return the size."""
        for start in self.starts_of(num_trained):
            _validate_window(start, self.size, num_trained)
        return self.size

    def choose(
        self, iteration: int, plan: ChunkPlan, num_trained: int, generator: Generator
    ) -> tuple[range, ChunkPlan]:
        """Return the window of an iteration and the plan, which covers it."""
        return self(iteration, num_trained, generator), plan

    def __call__(self, iteration: int, num_trained: int, generator: Generator) -> range:
        """Return the window of an iteration, counted from 0."""
        start = self.start_at(iteration, num_trained, generator)
        return range(start, start + self.size)

    def places(self, plan: ChunkPlan, num_trained: int) -> dict[WindowSchedule, float]:
        """Return a fixed window for every first step."""
        starts = self.starts_of(num_trained)
        return {FixedWindow(self.size, start): share for start, share in starts.items()}


@dataclass(frozen=True)
class FixedWindow(_SizedWindow):
    """The same window always.

    Attributes:
        size: Number of steps.
        start: First step, counted from 0.
    """

    start: int = 0
    kind: Literal["fixed"] = field(default="fixed", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        """Refuse a window that begins before the first step."""
        super().__post_init__()
        if self.start < 0:
            raise ValueError(f"start is {self.start}; steps are counted from 0")

    def starts_of(self, num_trained: int) -> Mapping[int, float]:
        """Return the one start."""
        return {self.start: 1.0}

    def start_at(self, iteration: int, num_trained: int, generator: Generator) -> int:
        """Return the first step."""
        return self.start


@dataclass(frozen=True)
class RandomWindow(_SizedWindow):
    """A window whose start is drawn anew, uniformly, every iteration.

    Attributes:
        size: Number of steps.
        low: First step that the window may hold.
        high: The window lies below this step; where null, below N.

    Reference: Flow-GRPO-Fast, whose range is the first half of the steps; the "random" strategy of
    MixGRPO, arXiv:2507.21802, section 4.
    """

    low: int = 0
    high: int | None = None
    kind: Literal["random"] = field(default="random", kw_only=True, repr=False)

    def stop_of(self, num_trained: int) -> int:
        """Return the step below which the window lies.

        Raises:
            ValueError: If the range leaves the trained steps or cannot hold the window.
        """
        _validate_window(self.low, self.size, num_trained)
        stop = num_trained if self.high is None else self.high
        if stop > num_trained or self.low + self.size > stop:
            raise ValueError(
                f"a window of {self.size} steps is to lie in steps {self.low} to {stop - 1} "
                f"of {num_trained} trained steps; high must be in "
                f"[{self.low + self.size}, {num_trained}]; change it or shrink the window"
            )
        return stop

    def starts_of(self, num_trained: int) -> Mapping[int, float]:
        """Return every start, all equally likely."""
        starts = range(self.low, self.stop_of(num_trained) - self.size + 1)
        return {start: 1 / len(starts) for start in starts}

    def start_at(self, iteration: int, num_trained: int, generator: Generator) -> int:
        """Draw the start."""
        choices = self.stop_of(num_trained) - self.size - self.low + 1
        return self.low + int(torch.randint(choices, (), generator=generator))


PUBLISHED_RATE, PUBLISHED_AFTER = 0.1, 13

DECAYS = ("constant", "linear", "exponential")
"""How the stays of a sliding window shorten."""


@dataclass(frozen=True)
class SlidingWindow(_SizedWindow):
    r"""A window that starts at the highest noise and moves on, and begins again after the end.

    The window starts at 0, and after :math:`\tau(l)` iterations at start l it moves by ``stride``;
    its last start is N - size. How long it stays is

    - ``constant``: :math:`\tau`;
    - ``linear``: :math:`\lceil \tau (1 - l / N) \rceil`;
    - ``exponential``: :math:`\lceil \tau e^{-k \max(0, l - l_0)} \rceil`.

    Attributes:
        size: Number of steps.
        every: tau >= 1, iterations at the first position.
        stride: Steps that it moves by.
        decay: How the stays shorten: one of the three names above.
        rate: k > 0 of the exponential decay; null elsewhere, and for the published 0.1.
        after: l_0 of the exponential decay, before the last start; null elsewhere, and for the
            published 13, of 25 steps.

    Reference: MixGRPO, arXiv:2507.21802, section 4 ("progressive", "decay"). Published code lets
    the window run over the end, where it shrinks and may become empty; this one stops there.
    """

    every: int = 25
    stride: int = 1
    decay: Annotated[str, OneOf(DECAYS)] = "constant"
    rate: float | None = None
    after: int | None = None
    kind: Literal["sliding"] = field(default="sliding", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        """Refuse what cannot move, and numbers that nothing would read."""
        super().__post_init__()
        if self.every < 1 or self.stride < 1:
            raise ValueError(
                f"the window stays {self.every} iterations and moves by {self.stride}; both must "
                "be at least 1"
            )
        check_name("decay", self.decay, DECAYS)
        given = ((name, getattr(self, name)) for name in ("rate", "after"))
        unread = [f"{name} = {value}" for name, value in given if value is not None]
        if self.decay != "exponential" and unread:
            raise ValueError(
                f"{' and '.join(unread)} belongs to decay 'exponential', and decay is "
                f"{self.decay!r}; set it to that, or leave this out"
            )
        if self.rate is not None and not self.rate > 0:
            raise ValueError(
                f"the rate of the exponential decay is {self.rate}; it must be above 0, or the "
                "stays do not shorten; 0.1 is the published one"
            )

    def stays(self, start: int, num_trained: int) -> int:
        """Return the iterations spent at a start."""
        if self.decay == "linear":
            # In integers: 7 * (1 - 6 / 7) is 1.0000000000000002 in floating point.
            return -(-self.every * (num_trained - start) // num_trained)
        if self.decay == "exponential":
            rate = PUBLISHED_RATE if self.rate is None else self.rate
            after = PUBLISHED_AFTER if self.after is None else self.after
            # At least one, where the exponential is below the smallest float.
            return max(1, math.ceil(self.every * math.exp(-rate * max(0, start - after))))
        return self.every

    def starts(self, num_trained: int) -> list[int]:
        """Return every start of one pass, in order."""
        last = num_trained - self.size
        starts = list(range(0, last + 1, self.stride))
        return starts if starts[-1] == last else [*starts, last]

    def starts_of(self, num_trained: int) -> Mapping[int, float]:
        """Return every start with its share of one pass.

        Raises:
            ValueError: If the window does not fit, or an exponential decay shortens no stay.
        """
        _validate_window(0, self.size, num_trained)
        starts = self.starts(num_trained)
        after = PUBLISHED_AFTER if self.after is None else self.after
        if self.decay == "exponential" and starts[-1] <= after:
            raise ValueError(
                f"the exponential decay shortens the stays at starts after step {after}, and "
                f"a window of {self.size} in {num_trained} trained steps starts at "
                f"{starts[-1]} at the latest, so nothing would decay; set after below {starts[-1]}"
            )
        stays = {start: self.stays(start, num_trained) for start in starts}
        return {start: stay / sum(stays.values()) for start, stay in stays.items()}

    def start_at(self, iteration: int, num_trained: int, generator: Generator) -> int:
        """Return the start of an iteration; nothing is drawn."""
        starts = self.starts(num_trained)
        ends = list(accumulate(self.stays(start, num_trained) for start in starts))
        return starts[bisect_right(ends, iteration % ends[-1])]


@dataclass(frozen=True)
class ChunkWindow:
    """One chunk of a plan: the samples of a group branch where it begins.

    With the ODE outside and a group that starts from one noise, only the chunk's own noise tells
    the group's images apart, and its reward differences are due to that chunk alone.

    Attributes:
        indices: Chunks to draw from, all where empty; ``merged``: the steps that
            ``sampling.merge`` took together.

    Reference: TempFlow-GRPO, arXiv:2508.04324, section 3 (chunks of one); the chunk form is this
    library's.
    """

    indices: tuple[int, ...] | Literal["merged"] = ()
    kind: Literal["chunk"] = field(default="chunk", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        """Refuse repeats and negative indices."""
        if isinstance(self.indices, str):
            return
        distinct = len(set(self.indices)) == len(self.indices)
        if not distinct or min(self.indices, default=0) < 0:
            raise ValueError(
                f"indices are {tuple(self.indices)}; they must be distinct and >= 0; list each "
                "chunk once"
            )

    def num_planned(self, num_trained: int) -> int:
        """Return N: the plan covers all steps."""
        return num_trained

    def choices(self, plan: ChunkPlan) -> tuple[int, ...]:
        """Return the chunks that may be drawn.

        Raises:
            ValueError: If the plan does not have one of them, or merged steps were not found yet.
        """
        if isinstance(self.indices, str):
            raise ValueError(
                "indices 'merged' must be replaced by the merged steps before a window is drawn"
            )
        for index in self.indices:
            if not 0 <= index < plan.num_chunks:
                raise ValueError(
                    f"branching at chunk {index}, but the plan {plan} has chunks 0 to "
                    f"{plan.num_chunks - 1}"
                )
        return self.indices or tuple(range(plan.num_chunks))

    def choose(
        self, iteration: int, plan: ChunkPlan, num_trained: int, generator: Generator
    ) -> tuple[range, ChunkPlan]:
        """Draw a chunk uniformly; it is the window and the only chunk within it."""
        choices = self.choices(plan)
        pick = int(torch.randint(len(choices), (), generator=generator))
        window = plan.steps_of(choices[pick])
        return window, restrict_plan(plan, window)

    def places(self, plan: ChunkPlan, num_trained: int) -> dict[WindowSchedule, float]:
        """Return each chunk alone, all equally likely."""
        choices = self.choices(plan)
        return {replace(self, indices=(j,)): 1 / len(choices) for j in choices}


AnyWindow = AllSteps | FixedWindow | RandomWindow | SlidingWindow | ChunkWindow
