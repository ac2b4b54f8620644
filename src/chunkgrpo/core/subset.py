# SPDX-License-Identifier: Apache-2.0
"""Which samples are trained on, and with what is left of their advantages.

Axes: P prompts, B samples, prompt-major; R scores, C chunks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from .advantages import group_centred, validated_groups
from .precision import COUNT_TOLERANCE, ROUNDING
from .rounding import settled


def num_chosen(num_samples: int, share: float, num_updates: int = 1) -> int:
    r"""How many samples of a rollout are trained.

    .. math:: \max(U, \lceil f B \rceil)

    The product is taken up to rounding, so 0.28 of 25 is 7; each of U updates gets a sample.

    Args:
        num_samples: B >= U.
        share: f in (0, 1].
        num_updates: U >= 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"the share of samples that is kept is {share}; it must be in (0, 1]")
    return max(num_updates, math.ceil(share * num_samples - COUNT_TOLERANCE))


def largest_advantages(advantages: Tensor, number: int) -> Tensor:
    """Choose the samples whose advantages are largest in size, whatever their sign.

    A sample pulls in proportion to its advantage. Where advantages are normally distributed, the
    half that is largest in size holds 93 % of the sum of their squares, and training it costs half.
    The groups share the number: one in which a single image stands out gives that one.

    Args:
        advantages: [B], or [B, C] where they differ by chunk: then by the norm over chunks.
        number: Samples to choose, 1 to B.

    Returns:
        Their indices, ascending; the unit of the advantages does not matter. Of equal sizes the
        first are chosen, and neighbours in order that differ by one part in a million or less count
        as equal, so that rounding does not decide between, say, the right and the wrong half of a
        group.

    Reference: Xu et al., PODS, arXiv:2504.13818, which keeps those of largest reward variance in
    each group.
    """
    # In float64, where the square of no float32 under- or overflows.
    size_B = advantages.double().reshape(len(advantages), -1).square().sum(dim=1).sqrt()
    order_B = size_B.argsort(descending=True, stable=True)
    sorted_B = size_B[order_B]
    drops_B = sorted_B < sorted_B.roll(1) * (1 - ROUNDING)
    drops_B[0] = False
    rank_B = torch.empty_like(order_B)
    rank_B[order_B] = drops_B.cumsum(dim=0)
    return rank_B.argsort(stable=True)[:number].sort().values


def project_out(advantages: Tensor, held_RB: Tensor, num_prompts: int, chosen: Tensor) -> Tensor:
    r"""Take out of advantages what says anything about other scores.

    .. math:: A' = A - X X^+ A, \qquad X_{br} = h_{rb} - \bar h_{r,group(b)}

    A policy gradient moves the mean of a score h in proportion to the sum of A h over samples. With
    A' that sum is zero: what a rollout says of h by chance, or because h and the reward go together
    in it, no longer adds up to a drift. It costs one dimension in B a score.

    Args:
        advantages: [B], or [B, C] where they differ by chunk.
        held_RB: The scores to hold, [R, B]; one that is not finite counts as its group's mean, and
            so do those of a group that differ by rounding alone.
        num_prompts: P.
        chosen: Indices of the samples that are trained; the others get 0.

    Returns:
        As ``advantages``, in float32.
    """
    groups = [
        validated_groups(held_B, num_prompts, held_B.isfinite()) for held_B in held_RB.double()
    ]
    centred = [group_centred(settled(held_PG)).nan_to_num(0) for held_PG in groups]
    centred_RB = torch.stack(centred).flatten(1)
    all_BC = advantages.double().reshape(len(advantages), -1)
    x_SR, a_SC = centred_RB.T[chosen], all_BC[chosen]
    # Typed by hand: torch says nothing about it.
    pinv: Callable[[Tensor], Tensor] = cast(Any, torch.linalg).pinv
    left_BC = torch.zeros_like(all_BC)
    left_BC[chosen] = a_SC - x_SR @ (pinv(x_SR) @ a_SC)
    return left_BC.reshape(advantages.shape).float()


def scaled_within(advantages: Tensor, clip: float) -> Tensor:
    r"""Advantages of at most a size, made smaller all alike.

    .. math:: A' = A \min\Big(1, \frac{c}{\max_b |A_b|}\Big)

    Cutting the largest ones alone would bring back what :func:`project_out` has taken out; a common
    factor leaves every sum of A h at zero.

    Args:
        advantages: [B], or [B, C] where they differ by chunk: then each chunk has its factor.
        clip: c > 0.

    Returns:
        As ``advantages``.
    """
    largest = advantages.abs().amax(dim=0)
    return (advantages * (clip / largest).clamp(max=1.0)).clamp(-clip, clip)


def expressive_groups(num_held: int, num_prompts: int, kept_B: Tensor) -> Tensor:
    """Say in which groups scores can be held and something be left to learn, [P].

    The deviations of n images from their mean have n - 1 degrees of freedom; as many held scores
    can explain any advantages of the group.

    Args:
        num_held: Scores that are projected out.
        num_prompts: P.
        kept_B: False for dropped samples, [B].
    """
    return kept_B.reshape(num_prompts, -1).sum(dim=1) - 1 > num_held
