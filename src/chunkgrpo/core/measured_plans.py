# SPDX-License-Identifier: Apache-2.0
"""Plans cut from a measured curve of how fast a trajectory moves.

Axes: N trained steps, C chunks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from .plans import ChunkPlan, explicit_plan, whole_plan
from .precision import host_values

# Sums of squared logarithms below this are rounding, which must not buy chunks for a flat curve.
FLAT = 1e-12


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
    inherited: list[int] = []
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
    values = [float(value) for value in host_values(curve_N)]
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
