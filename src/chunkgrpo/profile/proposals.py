# SPDX-License-Identifier: Apache-2.0
"""Where to cut a curve of speed into chunks, by several rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from chunkgrpo.core.measured_plans import adaptive_plan, explained_variation, optimal_plan
from chunkgrpo.core.plans import PAPER_SIZES, ChunkPlan, equal_plan, paper_plan

PAPER_CHUNKS = len(PAPER_SIZES)
RULES = (
    "optimal", "optimal-4", "adaptive-forward", "adaptive-backward", "adaptive-central", "equal",
    "paper",
)  # fmt: skip
"""Names of the proposals, in the order shown; the paper's plan fits one schedule only."""


@dataclass(frozen=True)
class Proposal:
    """Chunks that a rule proposes.

    Attributes:
        rule: One of ``RULES``.
        plan: The chunks.
        reason: One sentence.
    """

    rule: str
    plan: ChunkPlan
    reason: str


@dataclass(frozen=True)
class Window:
    """The window of a recipe: the steps that are stochastic and trained on.

    Attributes:
        size: Number of steps, W.
        places: Every first step that they can have, with its share of the iterations.
        prefix: How the steps before are taken, see :class:`~chunkgrpo.rollout.Sampler`.
    """

    size: int
    places: Mapping[int, float]
    prefix: str = "ode"

    def __str__(self) -> str:
        """The steps in words."""
        first = min(self.places)
        if len(self.places) == 1:
            return f"steps {first} to {first + self.size - 1}"
        return (
            f"{self.size} steps that begin at one of {len(self.places)} places, step {first} to "
            f"step {max(self.places)}"
        )


def propose(
    curve: Sequence[float] | NDArray, min_size: int = 4, shares: Sequence[float] = (1.0,)
) -> tuple[Proposal, ...]:
    r"""Cut a curve by every rule that fits it.

    A window that moves has a curve for each place a, and the sizes of its chunks count from its
    start. They are cut from the geometric mean

    .. math:: \log \bar L_k = \sum_a w_a \log L_{ak}

    and the reasons also say how much they explain at the place that they fit worst.

    Args:
        curve: Mean speed per trained step, [N], or at each place, [A, N]; > 0.
        min_size: Of the adaptive rule, cut to N: groups this small are not cut again.
        shares: Weight w of each place, [A], with sum 1.

    Returns:
        The proposals, in the order of ``RULES``.

    Raises:
        ValueError: If the curve is not positive and finite.
    """
    places_AN = torch.tensor(np.atleast_2d(np.asarray(curve, dtype=np.float64)))
    weights_A1 = torch.tensor(shares, dtype=torch.float64)[:, None]
    curve_N = places_AN[0] if len(places_AN) == 1 else (weights_A1 * places_AN.log()).sum(0).exp()
    num_steps = len(curve_N)
    few = min(PAPER_CHUNKS, num_steps)
    least = min(min_size, num_steps)

    def share(plan: ChunkPlan) -> str:
        text = f"{100 * explained_variation(curve_N, plan):.0f} % of the variation"
        if len(places_AN) == 1:
            return text
        worst = min(explained_variation(place_N, plan) for place_N in places_AN)
        return f"{text} in the mean over the places, {100 * worst:.0f} % at the worst one"

    optimal = optimal_plan(curve_N)
    proposals = [
        Proposal(
            "optimal",
            optimal,
            f"{optimal.num_chunks} is the fewest chunks that explain 95 % of the variation of log "
            f"speed, and no other {optimal.num_chunks} explain more than these: {share(optimal)}.",
        )
    ]
    plan = optimal_plan(curve_N, few)
    proposals.append(
        Proposal("optimal-4", plan, f"No other {few} chunks explain more: {share(plan)}.")
    )
    for difference in ("forward", "backward", "central"):
        plan = adaptive_plan(curve_N, least, difference)
        proposals.append(
            Proposal(
                f"adaptive-{difference}",
                plan,
                f"The published rule: cut where {difference} differences change sign, and again "
                f"in groups of more than {least}; explains {share(plan)}.",
            )
        )
    plan = equal_plan(-(-num_steps // few), num_steps)
    proposals.append(
        Proposal(
            "equal", plan, f"No measurement and no reweighting of steps; explains {share(plan)}."
        )
    )
    if num_steps == sum(PAPER_SIZES):
        plan = paper_plan(num_steps)
        proposals.append(
            Proposal("paper", plan, f"The published chunks fit; here they explain {share(plan)}.")
        )
    return tuple(proposals)


def carried_indices(old: ChunkPlan, indices: Sequence[int], new: ChunkPlan) -> tuple[int, ...]:
    """Chunks of a new plan that hold the steps that listed chunks of an old one held.

    Args:
        old: The plan whose chunks are listed.
        indices: Its chunks that are trained on.
        new: Another plan of the same steps.

    Returns:
        The new chunks at least half of whose steps were trained on, or else the one with the
        largest share.
    """
    trained = torch.zeros(old.num_chunks, dtype=torch.float64)
    trained[list(indices)] = 1
    shares = new.reduce(old.expand(trained)).tolist()
    kept = tuple(chunk for chunk, share in enumerate(shares) if share >= 0.5)
    return kept or (max(range(new.num_chunks), key=shares.__getitem__),)
