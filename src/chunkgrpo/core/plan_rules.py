# SPDX-License-Identifier: Apache-2.0
"""How a run gets its chunk plan: given, or cut from the measured dynamics of its own model.

Each rule is a value that can be written down before anything is loaded; :meth:`PlanRule.cut` makes
the plan once the number of trained steps is known. Measured rules ask for the model's curve then.

Axes: N trained steps, C chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal, Protocol

from torch import Tensor

from .dynamics import DISTANCES
from .measured_plans import DIFFERENCES, adaptive_plan, optimal_plan
from .names import OneOf, check_name
from .plans import (
    PAPER_SIZES,
    ChunkPlan,
    equal_plan,
    explicit_plan,
    paper_plan,
    step_plan,
    whole_plan,
)

Curve = Callable[[str], Tensor]
"""Measures the model's dynamics with a distance of ``DISTANCES``; returns [N]."""


class PlanRule(Protocol):
    """Where time is cut.

    Attributes:
        measured: Whether :meth:`cut` asks for the curve.
        refresh: Iterations after which the plan is cut anew; 0 keeps the first.
    """

    measured: ClassVar[bool]

    @property
    def refresh(self) -> int: ...

    def cut(self, num_trained: int, curve: Curve) -> ChunkPlan:
        """Return the plan over N steps.

        Raises:
            ValueError: If the rule does not fit N steps.
        """
        ...

    def num_chunks_of(self, num_trained: int) -> int | None:
        """Return C; None where only the measurement tells it."""
        ...


class _Given:
    """What rules without a measurement share."""

    measured: ClassVar[bool] = False
    refresh: ClassVar[int] = 0

    plan: Callable[[int], ChunkPlan]

    def cut(self, num_trained: int, curve: Curve) -> ChunkPlan:
        """Return the plan over N steps; nothing is measured."""
        return self.plan(num_trained)

    def num_chunks_of(self, num_trained: int) -> int | None:
        """Return C."""
        return self.plan(num_trained).num_chunks


@dataclass(frozen=True)
class ExplicitPlan(_Given):
    """The chunks that are listed.

    Attributes:
        sizes: Steps per chunk, noisiest first; they sum to the trained steps.
    """

    sizes: tuple[int, ...]
    kind: Literal["explicit"] = field(default="explicit", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        """Refuse an empty plan and chunks without steps."""
        object.__setattr__(self, "sizes", ChunkPlan(tuple(self.sizes)).sizes)

    def plan(self, num_trained: int) -> ChunkPlan:
        """Return the plan with these sizes."""
        return explicit_plan(self.sizes, num_trained)


@dataclass(frozen=True)
class EqualPlan(_Given):
    """Chunks of one size; what is left over becomes a smaller chunk at the end.

    Attributes:
        size: Steps per chunk, at least 1.
    """

    size: int = 4
    kind: Literal["equal"] = field(default="equal", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        """Refuse chunks without steps."""
        if self.size < 1:
            raise ValueError(f"size is {self.size}; a chunk has at least 1 step")

    def plan(self, num_trained: int) -> ChunkPlan:
        """Return :func:`~.plans.equal_plan`."""
        return equal_plan(self.size, num_trained)


@dataclass(frozen=True)
class StepPlan(_Given):
    """Every step is its own chunk: step-level GRPO."""

    kind: Literal["steps"] = field(default="steps", kw_only=True, repr=False)

    def plan(self, num_trained: int) -> ChunkPlan:
        """Return :func:`~.plans.step_plan`."""
        return step_plan(num_trained)


@dataclass(frozen=True)
class WholePlan(_Given):
    """All steps form one chunk: the sequence-level ratio."""

    kind: Literal["whole"] = field(default="whole", kw_only=True, repr=False)

    def plan(self, num_trained: int) -> ChunkPlan:
        """Return :func:`~.plans.whole_plan`."""
        return whole_plan(num_trained)


@dataclass(frozen=True)
class PaperPlan(_Given):
    """The published chunks, [2, 3, 4, 7], for 17 sampler steps."""

    kind: Literal["paper"] = field(default="paper", kw_only=True, repr=False)

    def plan(self, num_trained: int) -> ChunkPlan:
        """Return :func:`~.plans.paper_plan`."""
        return paper_plan(num_trained)

    def num_chunks_of(self, num_trained: int) -> int | None:
        """Return 4."""
        return len(PAPER_SIZES)


def _check_refresh(refresh: int) -> None:
    if refresh < 0:
        raise ValueError(f"refresh is {refresh}; it counts iterations; 0 keeps the first plan")


def _check_min_size(min_size: int) -> None:
    if min_size < 1:
        raise ValueError(f"min_size is {min_size}; a chunk has at least 1 step")


@dataclass(frozen=True)
class AdaptivePlan:
    """Cut where the derivatives of the measured curve change sign.

    Attributes:
        min_size: Groups of at most this many steps are not cut again.
        difference: Finite difference that stands for the derivative.
        distance: Measure of the speed that the curve is made of.
        refresh: Iterations after which the plan is measured anew; 0 keeps the first.
    """

    min_size: int = 4
    difference: Annotated[str, OneOf(DIFFERENCES)] = "forward"
    distance: Annotated[str, OneOf(DISTANCES)] = "l1"
    refresh: int = 0
    kind: Literal["adaptive"] = field(default="adaptive", kw_only=True, repr=False)

    measured: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse values outside their ranges."""
        _check_min_size(self.min_size)
        _check_refresh(self.refresh)
        check_name("difference", self.difference, DIFFERENCES)
        check_name("distance", self.distance, DISTANCES)

    def cut(self, num_trained: int, curve: Curve) -> ChunkPlan:
        """Return :func:`~.measured_plans.adaptive_plan` of the curve."""
        plan = adaptive_plan(curve(self.distance), self.min_size, self.difference)
        return plan.validate_for(num_trained)

    def num_chunks_of(self, num_trained: int) -> int | None:
        """Return None: the curve decides."""
        return None


@dataclass(frozen=True)
class OptimalPlan:
    """Cut so that the measured curve is as constant as possible within each chunk.

    Attributes:
        num_chunks: Number of chunks; where null, see ``explained``.
        min_size: Smallest chunk allowed.
        explained: Share of the curve's variation that the fewest chunks must explain, read where
            ``num_chunks`` is null.
        distance: Measure of the speed that the curve is made of.
        refresh: Iterations after which the plan is measured anew; 0 keeps the first.
    """

    num_chunks: int | None = None
    min_size: int = 4
    explained: float | None = None
    distance: Annotated[str, OneOf(DISTANCES)] = "l1"
    refresh: int = 0
    kind: Literal["optimal"] = field(default="optimal", kw_only=True, repr=False)

    measured: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse values outside their ranges, and two ways to choose the number of chunks."""
        _check_min_size(self.min_size)
        _check_refresh(self.refresh)
        check_name("distance", self.distance, DISTANCES)
        if self.num_chunks is not None and self.num_chunks < 1:
            raise ValueError(f"num_chunks is {self.num_chunks}; a plan has at least 1 chunk")
        if self.explained is not None and not 0 <= self.explained <= 1:
            raise ValueError(f"explained is {self.explained}; it is a share, in [0, 1]")
        if self.num_chunks is not None and self.explained is not None:
            raise ValueError(
                f"num_chunks is {self.num_chunks} and explained {self.explained}; each decides the "
                "number of chunks; set one of the two to null"
            )

    def cut(self, num_trained: int, curve: Curve) -> ChunkPlan:
        """Return :func:`~.measured_plans.optimal_plan` of the curve."""
        most = num_trained // self.min_size
        if not 1 <= (self.num_chunks or 1) <= most:
            raise ValueError(
                f"num_chunks is {self.num_chunks} and min_size {self.min_size}: {num_trained} "
                f"trained steps can be cut into at most {most} chunks of that size; lower one"
            )
        explained = DEFAULT_EXPLAINED if self.explained is None else self.explained
        plan = optimal_plan(curve(self.distance), self.num_chunks, self.min_size, explained)
        return plan.validate_for(num_trained)

    def num_chunks_of(self, num_trained: int) -> int | None:
        """Return C, or None where the curve decides."""
        return self.num_chunks


DEFAULT_EXPLAINED = 0.95
"""Share of the curve's variation explained where neither it nor the number of chunks is given."""

AnyPlanRule = (
    ExplicitPlan | EqualPlan | StepPlan | WholePlan | PaperPlan | AdaptivePlan | OptimalPlan
)
