# SPDX-License-Identifier: Apache-2.0
"""Solvers for the steps after the window, which are not trained on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from chunkgrpo.core.precision import COUNT_TOLERANCE


@dataclass(frozen=True)
class EulerTail:
    """All remaining steps, by Euler."""

    kind: Literal["euler"] = field(default="euler", kw_only=True, repr=False)
    solver: ClassVar[None] = None


@dataclass(frozen=True)
class MultistepTail:
    """Finish a trajectory with DPM-Solver++ in fewer steps than the schedule has left.

    Uses diffusers' ``DPMSolverMultistepScheduler`` with the given sigmas.

    Attributes:
        fraction: Number of steps as a share of the remaining ones, in (0, 1]; at least one step.
        order: 1 to 3; 2 is the midpoint form.

    Reference: MixGRPO-Flash, arXiv:2507.21802, section 4.3 (order 2, 0.4 of the steps).
    """

    fraction: float = 0.4
    order: int = 2
    kind: Literal["dpm"] = field(default="dpm", kw_only=True, repr=False)

    @property
    def solver(self) -> MultistepTail:
        """The solver, which is this object."""
        return self

    def __post_init__(self) -> None:
        """Refuse a share or an order out of range."""
        if not 0 < self.fraction <= 1:
            raise ValueError(f"the tail's fraction is {self.fraction}; it must be in (0, 1]")
        if self.order not in (1, 2, 3):
            raise ValueError(f"the tail's order is {self.order}; it must be 1, 2 or 3")

    def sigmas(self, left: Tensor) -> Tensor:
        """Return the noise levels that are visited: the ends of ``left``, and some between."""
        # 0.28 * 25 is 7.000000000000001 in floating point; it must give 7 steps.
        number = max(1, math.ceil(self.fraction * (len(left) - 1) - COUNT_TOLERANCE))
        index = torch.linspace(0, len(left) - 1, number + 1).round().long()
        return left[index]

    def __call__(
        self, velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, sigmas: Tensor
    ) -> Tensor:
        """Integrate from ``sigmas[0]`` to 0; see ``rollout.Tail``."""
        from diffusers import DPMSolverMultistepScheduler

        levels = self.sigmas(sigmas)
        solver = DPMSolverMultistepScheduler(
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            algorithm_type="dpmsolver++",
            solver_type="midpoint",
            solver_order=self.order,
            final_sigmas_type="zero",
        )
        solver.set_timesteps(len(levels) - 1)
        # Its own grid is another one; what it does with a grid depends on these numbers alone.
        solver.sigmas = levels.detach().cpu().float()
        solver.timesteps = levels[:-1].detach().cpu().float() * 1000
        solver.num_inference_steps = len(levels) - 1
        for level, timestep in zip(levels[:-1], solver.timesteps, strict=True):
            x = solver.step(velocity(x, level), timestep, x, return_dict=False)[0]
        return x
