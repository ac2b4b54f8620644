# SPDX-License-Identifier: Apache-2.0
"""Weighted draws without replacement, and how likely each item is to be among them.

Axes: B rows, C items, M draws.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

# Between nodes of the quadrature in log-time; its error is about exp(-pi^2 / step), below 1e-34.
LOG_TIME_STEP = 0.125


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
    inclusion: list[Tensor] = []
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
