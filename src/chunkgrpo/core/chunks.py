# SPDX-License-Identifier: Apache-2.0
"""Where time is cut, and which of the pieces are trained.

A :class:`ChunkPlan` partitions the N trained steps into consecutive chunks. One chunk is one
importance ratio and one clipping decision: chunks of one step are step-level GRPO, one chunk of
all steps is its sequence-level relative, and what lies between is Chunk-GRPO. Plans come from
constructors (published, equal, adaptive, optimal); selections then pick the chunks that each
sample trains.

Axes: B samples, N trained steps, C chunks, M chosen chunks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Protocol

import torch
from torch import Generator, Tensor

from .precision import at_least_float32

PAPER_SIZES = (2, 3, 4, 7)
"""Chunk sizes of the published runs: 17 sampler steps, 16 of them trained."""

# Keeps a chunk that did not move at all drawable; far below any real chunk's speed.
TINY_WEIGHT = 1e-8

# Sums of squared logarithms below this are rounding, which must not buy chunks for a flat curve.
FLAT = 1e-12

# Between nodes of the quadrature in log-time; its error is about exp(-pi^2 / step), below 1e-34.
LOG_TIME_STEP = 0.125

# 0.3 * 10 is 3.0000000000000004 in one order of operations and 2.9999999999999996 in another.
COUNT_TOLERANCE = 1e-9


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
        if not self.sizes or any(
            not isinstance(size, int) or isinstance(size, bool) or size < 1 for size in self.sizes
        ):
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
        return torch.stack([part.mean(dim=-1) for part in values_BN.split(self.sizes, -1)], -1)

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
        columns = values_BC.split(1, dim=-1)
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


# ---------------------------------------------------------------------------------------------
# Plans that need no measurement


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


# ---------------------------------------------------------------------------------------------
# Plans cut from a measured curve


def _forward_difference(values: list[float]) -> list[float]:
    return [b - a for a, b in pairwise(values)] + [math.nan]


def _backward_difference(values: list[float]) -> list[float]:
    return [math.nan] + [b - a for a, b in pairwise(values)]


def _central_difference(values: list[float]) -> list[float]:
    inner = [(b - a) / 2 for a, b in zip(values, values[2:], strict=False)]
    return [math.nan, *inner, math.nan][: len(values)]


DIFFERENCES: dict[str, Callable[[list[float]], list[float]]] = {
    "forward": _forward_difference,
    "backward": _backward_difference,
    "central": _central_difference,
}
"""First differences of a curve, same length, NaN where a neighbour is missing."""


def _inherited_signs(values: list[float]) -> list[int]:
    """-1 or +1 per entry; a tie or an edge takes its predecessor's sign, leading ones the first.

    All zero when no entry has a sign.
    """
    signs = [
        0 if math.isnan(value) or value == 0 else int(math.copysign(1, value)) for value in values
    ]
    previous = next((sign for sign in signs if sign), 0)
    inherited = []
    for sign in signs:
        previous = sign or previous
        inherited.append(previous)
    return inherited


def _validated_curve(curve_N: Tensor) -> list[float]:
    if curve_N.ndim != 1 or len(curve_N) == 0:
        raise ValueError(
            f"the curve has shape {tuple(curve_N.shape)}; chunks are cut from one value per "
            "trained step, [N]; average over the batch with mean_curve first"
        )
    values = [float(value) for value in curve_N.tolist()]
    for index, value in enumerate(values):
        if not math.isfinite(value):
            raise ValueError(
                f"curve[{index}] is {value}; every entry must be finite; look for a diverged "
                "sample in the rollout that it was measured on"
            )
    return values


def _logarithms(values: list[float]) -> Tensor:
    """[N] float64."""
    if min(values) <= 0:
        raise ValueError(
            f"the smallest entry of the curve is {min(values)}; logarithms need speeds above 0; "
            "use relative_l1 or relative_l2 of a trajectory that moves at every step"
        )
    return torch.tensor(values, dtype=torch.float64).log()


def _validate_min_size(min_size: int) -> None:
    if min_size < 1:
        raise ValueError(f"min_size is {min_size}; a chunk has at least 1 step; use 1 or more")


def adaptive_plan(curve_N: Tensor, min_size: int = 2, difference: str = "forward") -> ChunkPlan:
    """Cut where the curve's derivatives change sign.

    The rule, on the full curve: (1) take the first difference and group consecutive steps of the
    same sign; (2) a group of at most ``min_size`` steps is done; (3) any other group is cut where
    the next-higher difference changes sign inside it; (4) if it does not, the group is halved
    (an odd step goes to the first half); and so on, one order higher at each level.

    The publication leaves open what follows. Ties, and the steps at the edge where a difference
    does not exist, inherit the sign of the step before (or, at the start, the first sign there
    is). "Sufficiently small" is ``min_size``: a group that small is not cut again; cuts may
    still produce smaller ones. With a small ``min_size`` high orders amplify noise and
    fragment the curve into chunks of one and two; the curve of Flow-GRPO's sampler at 17 steps
    gives [1, 4, 4, 7] with forward differences and ``min_size`` 7.

    Args:
        curve_N: Speed of the trajectory per trained step (see :mod:`.dynamics`), [N], finite;
            averaged over the batch and over processes, so that all share one plan.
        min_size: Largest group that is left whole, >= 1.
        difference: "forward", "backward" or "central" (``DIFFERENCES``): to which of its steps
            a change of the curve belongs.

    Returns:
        The plan over N steps.

    Raises:
        ValueError: If the curve is not finite and one-dimensional, ``min_size`` < 1, or the
            difference is unknown.

    Reference: Chunk-GRPO, arXiv:2510.21583 v3, section 4.3.
    """
    values = _validated_curve(curve_N)
    _validate_min_size(min_size)
    if difference not in DIFFERENCES:
        raise ValueError(
            f"difference is {difference!r}; it must be one of {sorted(DIFFERENCES)}; "
            "choose one of these"
        )
    differentiate = DIFFERENCES[difference]

    def cut(start: int, stop: int, derivative: list[float]) -> list[int]:
        """Sizes of the groups of steps start..stop-1, cut at the sign changes of derivative."""
        signs = _inherited_signs(derivative)
        edges = [start]
        edges += [i for i in range(start + 1, stop) if signs[i] != signs[i - 1]]
        if len(edges) == 1:
            edges.append(start + (stop - start + 1) // 2)
        sizes: list[int] = []
        for left, right in zip(edges, [*edges[1:], stop], strict=True):
            if right - left <= min_size:
                sizes.append(right - left)
            else:
                sizes += cut(left, right, differentiate(derivative))
        return sizes

    if len(values) <= min_size:
        return whole_plan(len(values))
    return explicit_plan(cut(0, len(values), differentiate(values)), len(values))


def optimal_plan(
    curve_N: Tensor, num_chunks: int | None = None, min_size: int = 1, explained: float = 0.95
) -> ChunkPlan:
    r"""Cut so that the curve is as constant as possible within each chunk.

    .. math:: \min_{plan} \sum_j \sum_{i \in ch_j} (\log L_i - \overline{\log L}_j)^2

    The exact minimum over all plans, by dynamic programming in O(C N^2). Logarithms make a
    doubling of the speed count the same wherever it happens. With ``num_chunks`` None, the
    fewest chunks whose remaining sum is at most (1 - explained) of the uncut curve's (or, if
    ``min_size`` prevents that, the number of chunks with the smallest sum).

    Args:
        curve_N: Speed of the trajectory per trained step (see :mod:`.dynamics`), [N], finite
            and > 0.
        num_chunks: C in [1, N // min_size], or None to choose it.
        min_size: Smallest chunk allowed, in [1, N].
        explained: Share of the curve's variation that the cuts must explain, in [0, 1]; read
            only when ``num_chunks`` is None.

    Returns:
        The plan over N steps; among equally good ones, the one whose last chunk starts first.

    Raises:
        ValueError: If the curve is not positive, or no plan satisfies the limits.
    """
    values = _validated_curve(curve_N)
    num_steps = len(values)
    _validate_min_size(min_size)
    logs = _logarithms(values)
    most = num_steps // min_size
    if most == 0 or (num_chunks is not None and not 1 <= num_chunks <= most):
        raise ValueError(
            f"num_chunks is {num_chunks} with min_size {min_size}; {num_steps} steps can be cut "
            f"into 1 to {most} chunks of that size; lower min_size or change num_chunks"
        )
    if not 0 <= explained <= 1:
        raise ValueError(f"explained is {explained}; it is a share in [0, 1]; the default is 0.95")
    cost = {
        (start, stop): float((logs[start:stop] - logs[start:stop].mean()).square().sum())
        for start in range(num_steps)
        for stop in range(start + min_size, num_steps + 1)
    }
    # best[stop]: (smallest sum, sizes) of cutting the first `stop` steps into `count` chunks.
    best: dict[int, tuple[float, tuple[int, ...]]] = {
        stop: (cost[0, stop], (stop,)) for stop in range(min_size, num_steps + 1)
    }
    by_count = [best[num_steps]]
    for _ in range(1, most if num_chunks is None else num_chunks):
        best = {
            stop: min(
                (
                    (before + cost[start, stop], (*sizes, stop - start))
                    for start, (before, sizes) in best.items()
                    if stop - start >= min_size
                ),
                key=lambda candidate: candidate[0],
            )
            for stop in range(min(best) + min_size, num_steps + 1)
        }
        by_count.append(best[num_steps])
    if num_chunks is not None:
        return explicit_plan(by_count[-1][1], num_steps)
    allowed = (1 - explained) * by_count[0][0] + FLAT
    enough = [candidate for candidate in by_count if candidate[0] <= allowed]
    chosen = enough[0] if enough else min(by_count, key=lambda candidate: candidate[0])
    return explicit_plan(chosen[1], num_steps)


def explained_variation(curve_N: Tensor, plan: ChunkPlan) -> float:
    r"""Share of the curve's variation that lies between the chunks, not within them.

    .. math:: R^2 = 1 - \frac{\sum_j \sum_{i \in ch_j} (\log L_i - \overline{\log L}_j)^2}
                            {\sum_i (\log L_i - \overline{\log L})^2}

    What :func:`optimal_plan` maximises for a given number of chunks. A flat curve has nothing to
    explain: 1.

    Args:
        curve_N: Speed of the trajectory per trained step, [N], finite and > 0.
        plan: A plan over N steps.

    Returns:
        A share in [0, 1].

    Raises:
        ValueError: If the curve is not positive or the plan does not cover it.
    """
    logs_N = _logarithms(_validated_curve(curve_N))
    within = (logs_N - plan.expand(plan.reduce(logs_N))).square().sum()
    total = (logs_N - logs_N.mean()).square().sum()
    return float(1 - within / total) if float(total) > FLAT else 1.0


# ---------------------------------------------------------------------------------------------
# Which chunks are trained


def _validate_fraction(fraction: float) -> None:
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
    _validate_fraction(fraction)
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


def plackett_luce_draw(weights_BC: Tensor, num_drawn: int, generator: Generator) -> Tensor:
    """Draw items of each row one after another, without replacement, in proportion to weights.

    Args:
        weights_BC: Weights > 0, [B, C]; rows need not sum to 1.
        num_drawn: M in [0, C].
        generator: Source of the draws, on the weights' device.

    Returns:
        LongTensor [B, M], in the order drawn.

    Reference: Plackett 1975, "The analysis of permutations".
    """
    # An exponential race: arrival times with rates w finish in Plackett-Luce order. The
    # same law as torch.multinomial without replacement, without its device synchronisation.
    arrivals_BC = torch.empty_like(weights_BC).exponential_(generator=generator) / weights_BC
    return arrivals_BC.argsort(dim=1)[:, :num_drawn]


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

    def __post_init__(self) -> None:
        """Refuse a share outside (0, 1]."""
        _validate_fraction(self.fraction)

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

    def __post_init__(self) -> None:
        """Refuse a share outside (0, 1]."""
        _validate_fraction(self.fraction)

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


def plackett_luce_inclusion(weights_BC: Tensor, num_drawn: int) -> Tensor:
    r"""Probability that each item is among the first ``num_drawn`` of a weighted draw.

    Items are drawn one after another without replacement, each draw in proportion to the weights
    of what is left. The draws are those of a race in which item j arrives at a time distributed
    exponentially with rate :math:`w_j`, so that

    .. math:: \pi_j = \int_0^\infty w_j e^{-w_j t}\,
              P\Big(\sum_{k \ne j} 1[T_k < t] \le M-1\Big)\,dt .

    In :math:`y = \log t` the integrand decays exponentially on one side and doubly so on the
    other, and the trapezoidal rule is exact to the rounding of float64; the count inside has a
    Poisson binomial distribution, found by adding one item after another. The cost,
    O(B C^2 M), allows plans of a chunk per step, where enumerating sets would not end.

    Args:
        weights_BC: Weights > 0, [..., C]; they need not sum to 1.
        num_drawn: M in [0, C].

    Returns:
        [..., C] float64 in [0, 1], each row summing to M.

    Raises:
        ValueError: If a weight is not positive and finite, or M is outside [0, C].

    Reference: Plackett 1975, "The analysis of permutations"; for the race, Efraimidis and
    Spirakis, Information Processing Letters 97 (2006); for the rule's accuracy, Trefethen and
    Weideman, SIAM Review 56 (2014).
    """
    weights_BC = weights_BC.double()
    smallest, largest = float(weights_BC.min()), float(weights_BC.max())
    if not (math.isfinite(largest) and smallest > 0):
        raise ValueError(
            f"weights lie between {smallest} and {largest}; each must be positive and finite; "
            "add a small constant"
        )
    num_items = weights_BC.shape[-1]
    if not 0 <= num_drawn <= num_items:
        raise ValueError(
            f"num_drawn is {num_drawn}; {num_items} items allow 0 to {num_items} draws; "
            "choose a number in that range"
        )
    if num_drawn in (0, num_items):
        return torch.full_like(weights_BC, float(num_drawn > 0))
    rates_BC = weights_BC / weights_BC.sum(dim=-1, keepdim=True)
    # Below exp(-40) nothing has arrived yet, and after 40 mean waits of the slowest item all has.
    nodes_Q = torch.arange(-40.0, math.log(40 / float(rates_BC.min())), LOG_TIME_STEP).to(rates_BC)
    time_Q = nodes_Q.exp()
    away_BCQ = (-rates_BC[..., None] * time_Q).exp()
    here_BCQ = -torch.expm1(-rates_BC[..., None] * time_Q)
    inclusion = []
    for item in range(num_items):
        # count_BMQ[m]: probability that exactly m of the other items have arrived, m < M.
        count_BMQ = away_BCQ.new_zeros(*rates_BC.shape[:-1], num_drawn, len(time_Q))
        count_BMQ[..., 0, :] = 1
        for other in range(num_items):
            if other == item:
                continue
            here_BQ, away_BQ = here_BCQ[..., other, None, :], away_BCQ[..., other, None, :]
            one_fewer_BMQ = torch.nn.functional.pad(count_BMQ[..., :-1, :], (0, 0, 1, 0))
            count_BMQ = count_BMQ * away_BQ + one_fewer_BMQ * here_BQ
        density_BQ = rates_BC[..., item, None] * time_Q * away_BCQ[..., item, :]
        inclusion.append(LOG_TIME_STEP * (density_BQ * count_BMQ.sum(dim=-2)).sum(dim=-1))
    return torch.stack(inclusion, dim=-1).clamp(max=1.0)
