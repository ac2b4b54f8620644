# SPDX-License-Identifier: Apache-2.0
"""Rounding is not signal: which differences of rewards are the last bits of a float.

Axes: P prompts, G images per prompt.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import ROUNDING


def settled(rewards_PG: Tensor, sizes_PG: Tensor | None = None) -> Tensor:
    r"""Rewards whose differences within a group are rounding made exactly equal.

    .. math:: \max_g r - \min_g r \le 10^{-6} \max_g |m|

    with m the reward itself, or the numbers that it is the difference or the sum of: the rounding
    of a difference is that of what was subtracted. The rule does not depend on the reward's unit.
    It does on its origin: 1000.0001 and 1000.0002 are equal, as float32 would have made them
    anyhow, and 0.0001 and 0.0002 are not.

    Args:
        rewards_PG: [P, G], NaN where an image is dropped.
        sizes_PG: |m|, [P, G]; the rewards' own size where None.

    Returns:
        [P, G]: where a group is flat, its largest reward everywhere (NaN stays).
    """
    dropped_PG = rewards_PG.isnan()
    sizes_PG = rewards_PG.abs() if sizes_PG is None else sizes_PG
    highest_P = rewards_PG.masked_fill(dropped_PG, -torch.inf).amax(dim=1)
    lowest_P = rewards_PG.masked_fill(dropped_PG, torch.inf).amin(dim=1)
    largest_P = sizes_PG.masked_fill(dropped_PG | sizes_PG.isnan(), 0.0).amax(dim=1)
    flat_P = (highest_P - lowest_P <= ROUNDING * largest_P) & largest_P.isfinite()
    return torch.where(flat_P[:, None] & ~dropped_PG, highest_P[:, None], rewards_PG)


def without_spread(rewards_PG: Tensor) -> Tensor:
    """Say which groups teach nothing, [P]: rewards equal up to rounding, or fewer than two left."""
    dropped_PG, rewards_PG = rewards_PG.isnan(), settled(rewards_PG)
    highest_P = rewards_PG.masked_fill(dropped_PG, -torch.inf).amax(dim=1)
    lowest_P = rewards_PG.masked_fill(dropped_PG, torch.inf).amin(dim=1)
    return (highest_P == lowest_P) | ((~dropped_PG).sum(dim=1) < 2)
