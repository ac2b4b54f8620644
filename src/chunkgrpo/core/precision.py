# SPDX-License-Identifier: Apache-2.0
"""The one rule of precision: arithmetic happens in float32 or better.

Importance ratios of this method are clipped at about 5e-5; bfloat16 resolves 4e-3.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return ``tensor`` in float32, or untouched where it is float32 or float64 already.

    Args:
        tensor: Any real dtype and shape.

    Returns:
        The same values, same shape, same device, float32 or float64.
    """
    if tensor.dtype in (torch.float32, torch.float64):
        return tensor
    return tensor.float()


def beside(values: Tensor, x: Tensor) -> Tensor:
    """Give values of the first axes of ``x`` trailing axes, so that they broadcast over its others.

    Plain broadcasting would align them with the last axes instead.

    Args:
        values: [B], or any shape that begins that of ``x``; a 0-dim value passes.
        x: [B, ...].

    Returns:
        [B, 1, ...].
    """
    if not values.ndim:
        return values
    return values.reshape(*values.shape, *[1] * (x.ndim - values.ndim))


def host_values(tensor: Tensor) -> list[float]:
    """Return the values of a one-dimensional tensor as Python numbers.

    What ``tolist`` returns, whose type torch leaves open.
    """
    return cast(Any, tensor).tolist()


# 0.3 * 10 is 3.0000000000000004 in one order of operations and 2.9999999999999996 in another.
COUNT_TOLERANCE = 1e-9
"""Slack of a share of a number before it is rounded to a whole one."""

ROUNDING = 1e-6
"""Relative difference of two numbers that is rounding: float32 resolves 6e-8, and the mean over a
group, or a network's sum in another order, loses a few bits of that."""
