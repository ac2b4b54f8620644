# SPDX-License-Identifier: Apache-2.0
"""Several rewards become one learning signal, in one of the ways of ``COMBINATIONS``.

Axes: P prompts, G images per prompt, B = P * G samples, prompt-major; R rewards, C chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .advantages import (
    CONVENTIONS,
    SMALL,
    Advantages,
    chunk_advantages,
    chunk_gains,
    group_advantages,
    group_mean,
    group_spread,
    validated_groups,
)
from .precision import ROUNDING, host_values
from .rounding import settled, without_spread


def weighted_sum(rewards_RB: Tensor, weights_R: Tensor) -> Tensor:
    r"""Rewards added by weight.

    .. math:: T_b = \sum_k w_k r_{kb}

    The reward of the larger spread decides, whatever the weights were meant to say.

    Args:
        rewards_RB: [R, B].
        weights_R: [R], any sign.

    Returns:
        [B].
    """
    total_B = torch.zeros_like(rewards_RB[0])
    for weight, rewards_B in zip(weights_R, rewards_RB, strict=True):
        total_B = total_B + weight * rewards_B
    return total_B


def weighted_product(rewards_RB: Tensor, weights_R: Tensor) -> Tensor:
    r"""Rewards multiplied, their weights being exponents.

    .. math:: T_b = \prod_k r_{kb}^{w_k}

    A zero in one reward cannot be made up for by another. Only relative differences count, so
    units do not matter.

    Args:
        rewards_RB: [R, B], not negative: the product of two bad scores must not be a good one.
        weights_R: [R], positive.

    Returns:
        [B].
    """
    return (rewards_RB ** weights_R[:, None]).prod(dim=0)


def weighted_minimum(rewards_RB: Tensor, weights_R: Tensor) -> Tensor:
    r"""The worst reward after scaling.

    .. math:: T_b = \min_k w_k r_{kb}

    Weights bring rewards to one scale; one that is never the smallest teaches nothing.

    Args:
        rewards_RB: [R, B].
        weights_R: [R], positive.

    Returns:
        [B].
    """
    return (rewards_RB * weights_R[:, None]).amin(dim=0)


@dataclass(frozen=True)
class Combination:
    """One way to make one learning signal of several rewards.

    Attributes:
        total: [R, B] rewards and [R] weights -> [B].
        by_reward: Whether each reward becomes advantages of its own, which are then added by
            weight; ``total`` is then what is reported, not what is trained on.
        rescaled: Whether the sum of advantages is brought to unit deviation over the batch.
        positive: Whether weights must be positive.
    """

    total: Callable[[Tensor, Tensor], Tensor]
    by_reward: bool = False
    rescaled: bool = False
    positive: bool = False


COMBINATIONS: dict[str, Combination] = {
    "sum": Combination(weighted_sum),
    "advantage": Combination(weighted_sum, by_reward=True),
    "gdpo": Combination(weighted_sum, by_reward=True, rescaled=True),
    "product": Combination(weighted_product, positive=True),
    "minimum": Combination(weighted_minimum, positive=True),
}
"""Combinations by the name a configuration uses."""


def _validated_combination(
    rewards_RB: Tensor, weights_R: Tensor, combination: str, kept_B: Tensor | None
) -> Combination:
    if combination not in COMBINATIONS:
        raise ValueError(
            f"the combination of rewards is {combination!r}; it must be one of "
            f"{sorted(COMBINATIONS)}; choose one of these"
        )
    if rewards_RB.ndim != 2 or weights_R.shape != rewards_RB.shape[:1] or not len(weights_R):
        raise ValueError(
            f"rewards of shape {tuple(rewards_RB.shape)} and weights of shape "
            f"{tuple(weights_R.shape)} do not fit; pass [R, B] and [R], at least one reward"
        )
    rule = COMBINATIONS[combination]
    if rule.positive and not (weights_R > 0).all():
        raise ValueError(
            f"reward weights are {host_values(weights_R)}; combination {combination!r} needs "
            "positive ones; use 'sum' to subtract a reward"
        )
    if rule.total is weighted_product:
        wrong_RB = rewards_RB < 0
        if kept_B is not None:
            wrong_RB = wrong_RB & kept_B
        if wrong_RB.any():
            reward, sample = (int(index) for index in wrong_RB.nonzero()[0])
            raise ValueError(
                f"reward {reward} scored {rewards_RB[reward, sample].item():g} for sample "
                f"{sample}; a product needs scores that are not negative; shift the reward, or "
                "combine by 'advantage'"
            )
    return rule


def combined_rewards(
    rewards_RB: Tensor, weights_R: Tensor, combination: str = "sum", kept_B: Tensor | None = None
) -> Tensor:
    """One number per sample from several rewards.

    Args:
        rewards_RB: [R, B], finite where kept.
        weights_R: [R].
        combination: A name in ``COMBINATIONS``.
        kept_B: False for dropped samples, [B]; all are kept where None.

    Returns:
        [B], NaN where dropped.

    Raises:
        ValueError: If the combination is unknown, or weights or scores are not allowed in it.
    """
    rule = _validated_combination(rewards_RB, weights_R, combination, kept_B)
    return _total(rule, rewards_RB, weights_R, kept_B)


def _total(
    rule: Combination, rewards_RB: Tensor, weights_R: Tensor, kept_B: Tensor | None
) -> Tensor:
    total_B = rule.total(rewards_RB, weights_R)
    return total_B if kept_B is None else total_B.masked_fill(~kept_B, float("nan"))


def settled_samples(
    rewards_B: Tensor, sizes_B: Tensor, num_prompts: int, kept_B: Tensor | None
) -> Tensor:
    """:func:`settled` for rewards by sample, [B], of which some may be dropped."""
    rewards_PG = validated_groups(rewards_B, num_prompts, kept_B)
    return settled(rewards_PG, sizes_B.reshape(rewards_PG.shape)).reshape(-1)


def _size(rule: Combination, rewards_RB: Tensor, weights_R: Tensor, total_B: Tensor) -> Tensor:
    """Return the size of the numbers that a combined reward comes from, [B]: of a sum, its terms'.

    Where large terms cancel, what is left has their rounding.
    """
    return torch.maximum(total_B.abs(), rule.total(rewards_RB.abs(), weights_R.abs()))


def _part_size(rewards_B: Tensor, part: Advantages, num_prompts: int) -> Tensor:
    """Return the size of the numbers that advantages come from, [B]: rewards in their unit."""
    advantages_PG = part.values.reshape(num_prompts, -1)
    unit_P1 = (group_spread(advantages_PG)[:, 0] / part.spread).nan_to_num(0, 0, 0)[:, None]
    rewards_PG = rewards_B.reshape(num_prompts, -1).abs().nan_to_num(0, 0, 0) * unit_P1
    return torch.maximum(rewards_PG, advantages_PG.abs()).flatten()


def combined_advantages(
    rewards_RB: Tensor,
    weights_R: Tensor,
    num_prompts: int,
    combination: str = "sum",
    convention: str = "group_std",
    clip: float | None = 5.0,
    kept_B: Tensor | None = None,
    total_B: Tensor | None = None,
) -> Advantages:
    r"""Group-relative advantages of several rewards.

    By reward (``"advantage"``, ``"gdpo"``), with :math:`A_k` the advantages of reward k alone:

    .. math:: A_b = \sum_k w_k A_{kb}, \qquad
              A^{gdpo}_b = \frac{A_b - \bar A}{s_{B-1} + 10^{-4}}

    so weights say what they seem to, whatever the rewards' units; else those of the combined
    reward. Under a convention that centres groups, a group in which no reward has any spread keeps
    advantage exactly 0, also where the batch's mean is not 0 (``group_std_median`` of skewed
    rewards). The clamp is applied to the result.

    Args:
        rewards_RB: [R, B], finite where kept.
        weights_R: [R].
        num_prompts: P.
        combination: A name in ``COMBINATIONS``.
        convention, clip, kept_B: As in :func:`group_advantages`.
        total_B: :func:`combined_rewards` where they are known.

    Returns:
        Advantages. By reward, a group has no spread where no reward has any; the spread is that
        of the weighted sum. Where rewards contradict one another exactly, the group's advantages
        are 0.

    Raises:
        ValueError: As :func:`group_advantages` and :func:`combined_rewards`.

    Reference: GDPO, arXiv:2601.05242, for the normalisation by reward and the rescaling.
    """
    rule = _validated_combination(rewards_RB, weights_R, combination, kept_B)
    if total_B is None:
        total_B = _total(rule, rewards_RB, weights_R, kept_B)
    total_B = settled_samples(
        total_B, _size(rule, rewards_RB, weights_R, total_B), num_prompts, kept_B
    )
    whole = group_advantages(total_B, num_prompts, convention, clip, kept_B)
    if not rule.by_reward:
        return whole
    each = [group_advantages(r_B, num_prompts, convention, None, kept_B) for r_B in rewards_RB]
    parts_RB = torch.stack([part.values for part in each])
    values_B = weighted_sum(parts_RB, weights_R)
    # Where rewards contradict one another exactly, what is left of their sum is rounding.
    sizes_RB = torch.stack([_part_size(*pair, num_prompts) for pair in zip(rewards_RB, each)])
    sizes_B = weighted_sum(sizes_RB, weights_R.abs())
    values_PG, sizes_PG = (x.reshape(num_prompts, -1) for x in (values_B, sizes_B))
    size_P = sizes_PG.amax(dim=1)
    left_P = ~(values_PG.abs().amax(dim=1) <= ROUNDING * size_P) | ~size_P.isfinite()
    values_B = values_PG.masked_fill(~left_P[:, None], 0.0).flatten()
    if rule.rescaled:
        counted_B = slice(None) if kept_B is None else kept_B
        rest_B = values_B[counted_B]
        if len(rest_B) > 1:
            scaled_B = (values_B - rest_B.mean()) / (rest_B.std() + SMALL)
            values_B = scaled_B if kept_B is None else scaled_B.masked_fill(~kept_B, 0.0)
    flat_P = torch.stack([part.spread == 0 for part in each]).all(dim=0)
    if rule.rescaled and CONVENTIONS[convention].centres_groups:
        # The batch's mean is 0 only where each group's is; a group that teaches nothing stays at 0.
        silent_P = flat_P | ~left_P
        values_PG = values_B.reshape(num_prompts, -1).masked_fill(silent_P[:, None], 0.0)
        values_B = values_PG.flatten()
    if clip is not None:
        values_B = values_B.clamp(-clip, clip)
    return Advantages(values_B, whole.spread, flat_P.sum())


def _larger(first_B: Tensor, second_B: Tensor) -> Tensor:
    return torch.maximum(first_B.abs(), second_B.abs())


def combined_chunk_advantages(
    rewards_RBE: Tensor,
    weights_R: Tensor,
    num_prompts: int,
    combination: str = "sum",
    convention: str = "group_std",
    clip: float | None = 5.0,
    kept_B: Tensor | None = None,
    totals_BE: Tensor | None = None,
) -> Tensor:
    """Group-relative advantages of each chunk by what it adds to several rewards.

    By reward, a chunk's gains in each reward are normalised before they are added; else the
    combined reward's gains are those of :func:`chunk_gains`.

    Args:
        rewards_RBE: Each reward of the predictions at the chunk boundaries, [R, B, C+1].
        weights_R, num_prompts, combination, convention, clip, kept_B: As in
            :func:`combined_advantages`.
        totals_BE: :func:`combined_rewards` at each boundary where they are known.

    Returns:
        [B, C].
    """
    boundaries = rewards_RBE.unbind(2)
    rule, *_ = [_validated_combination(r_RB, weights_R, combination, kept_B) for r_RB in boundaries]
    if rule.by_reward:
        columns: list[Tensor] = []
        for before_RB, after_RB in pairwise(boundaries):
            gains = [
                settled_samples(after_B - before_B, _larger(before_B, after_B), num_prompts, kept_B)
                for before_B, after_B in zip(before_RB, after_RB, strict=True)
            ]
            shared = (weights_R, num_prompts, combination, convention, clip, kept_B)
            columns.append(combined_advantages(torch.stack(gains), *shared).values)
        return torch.stack(columns, dim=1)
    if totals_BE is None:
        totals = [_total(rule, r_RB, weights_R, kept_B) for r_RB in boundaries]
        totals_BE = torch.stack(totals, dim=1)
    elif kept_B is not None:
        totals_BE = totals_BE.masked_fill(~kept_B[:, None], float("nan"))
    sizes = [
        _size(rule, r_RB, weights_R, total_B)
        for r_RB, total_B in zip(boundaries, totals_BE.unbind(1), strict=True)
    ]
    # A gain has the rounding of the rewards at both its ends, however small it is itself.
    gains = [
        settled_samples(gain_B, _larger(*ends), num_prompts, kept_B)
        for gain_B, ends in zip(chunk_gains(totals_BE).unbind(1), pairwise(sizes), strict=True)
    ]
    return chunk_advantages(torch.stack(gains, dim=1), num_prompts, convention, clip, kept_B)


def reward_shares(
    rewards_RB: Tensor,
    weights_R: Tensor,
    num_prompts: int,
    combination: str = "sum",
    convention: str = "group_std",
    kept_B: Tensor | None = None,
) -> Tensor:
    r"""How much of the advantages' variance each reward brings.

    .. math:: \rho_k = \frac{\sum_b a_{kb}^2}{\sum_j \sum_b a_{jb}^2}

    with :math:`a_k` the reward's own part of the advantage: of a sum, its weighted deviation from
    the group's mean over what the group is divided by; by reward, its weighted advantage; of a
    product, to first order, its weighted deviation relative to the group's mean, times the mean
    product. A minimum has no parts: there :math:`\rho_k` is the share of samples in which reward k
    is the smallest, ties divided. Parts may cancel (two rewards that disagree); shares do not show
    it, correlations do.

    Args:
        rewards_RB, weights_R, num_prompts, combination, convention, kept_B: As in
            :func:`combined_advantages`.

    Returns:
        [R], summing to 1; NaN where no group teaches anything.
    """
    rule = _validated_combination(rewards_RB, weights_R, combination, kept_B)
    if kept_B is None:
        kept_B = torch.ones_like(rewards_RB[0], dtype=torch.bool)
    groups_RPG = torch.stack([
        settled(validated_groups(r_B, num_prompts, kept_B)) for r_B in rewards_RB
    ])  # fmt: skip
    if rule.total is weighted_minimum:
        scaled_RB = (rewards_RB * weights_R[:, None])[:, kept_B]
        lowest_RB = (scaled_RB == scaled_RB.amin(dim=0)).float()
        return (lowest_RB / lowest_RB.sum(dim=0)).mean(dim=1)
    weights_R11 = weights_R[:, None, None]
    if rule.by_reward:
        each = [group_advantages(r, num_prompts, convention, None, kept_B) for r in rewards_RB]
        shape = groups_RPG.shape
        parts_RPG = weights_R11 * torch.stack([part.values for part in each]).reshape(shape)
    else:
        total_B = rule.total(rewards_RB, weights_R)
        sizes_B = _size(rule, rewards_RB, weights_R, total_B)
        total_B = settled_samples(total_B, sizes_B, num_prompts, kept_B)
        whole = group_advantages(total_B, num_prompts, convention, None, kept_B)
        total_PG = total_B.masked_fill(~kept_B, float("nan")).reshape(num_prompts, -1)
        advantage_PG = whole.values.masked_fill(~kept_B, float("nan")).reshape(num_prompts, -1)
        # What a group is divided by, without asking the convention; groups without spread count 0.
        factor_P1 = (group_spread(advantage_PG) / group_spread(total_PG)).nan_to_num(0, 0, 0)
        factor_P1 = factor_P1.masked_fill(without_spread(total_PG)[:, None], 0.0)
        mean_RP1 = torch.stack([group_mean(r_PG) for r_PG in groups_RPG])
        parts_RPG = weights_R11 * (groups_RPG - mean_RP1) * factor_P1
        if rule.total is weighted_product:
            level_P1 = weighted_product(mean_RP1.flatten(1), weights_R)[:, None]
            parts_RPG = (parts_RPG * level_P1 / mean_RP1).nan_to_num(0, 0, 0)
    power_R = parts_RPG.square().flatten(1).nansum(dim=1)
    return power_R / power_R.sum()
