# SPDX-License-Identifier: Apache-2.0
"""Exponential moving average of trainable parameters."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from chunkgrpo.runtime.weights import swapped


@dataclass(frozen=True)
class Averaging:
    """The settings of :class:`Ema`.

    Attributes:
        decay: Decay of the averaged weights, which are evaluated and saved, in [0, 1); with 0 there
            is no average.
        warmup: The decay of update n is at most n / (n + warmup), so the average covers about the
            last 1 / warmup of the run; above 0.
    """

    decay: float = 0.9
    warmup: float = 9.0

    def __post_init__(self) -> None:
        """Refuse values outside their ranges."""
        Ema((), self.decay, self.warmup)


class Ema:
    r"""Keeps :math:`\bar\theta \leftarrow d \bar\theta + (1-d) \theta`, with a warm-up of d.

    The decay of update n (from 1) is min(decay, n / (n + warmup)). While it rises, the average of n
    updates gives the i-th a weight of about i^(warmup - 1): 1 is the plain mean of all, 9 (usual)
    has a mean age of a tenth of the updates, 3 of a quarter. An average cannot reach further
    back, whatever the decay: with 9, a decay of 0.97 (about 33 updates) is reached after 290.

    Args:
        parameters: The parameters that are averaged.
        decay: In [0, 1); 0 follows exactly.
        warmup: Above 0.

    Reference: Karras et al., arXiv:2312.02696, section 3.1, on averages of power profile.
    """

    def __init__(self, parameters: Sequence[Tensor], decay: float, warmup: float = 9.0) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema decay must lie in [0, 1), got {decay}; 0.9 suits short runs")
        if not warmup > 0:
            raise ValueError(f"the warm-up of the ema is {warmup}; it must be above 0, 9 is usual")
        self.warmup = warmup
        self.decay = decay
        self.values = [p.detach().clone() for p in parameters]
        self.num_updates = 0

    @torch.no_grad()
    def update(self, parameters: Sequence[Tensor]) -> None:
        """Update the average with the current parameters."""
        self.num_updates += 1
        decay = min(self.decay, self.num_updates / (self.num_updates + self.warmup))
        torch._foreach_lerp_(self.values, [p.detach() for p in parameters], 1 - decay)

    def applied(self, parameters: Sequence[Tensor]) -> AbstractContextManager[None]:
        """Inside this context the parameters have the averaged values, and must not be changed."""
        return swapped(parameters, self.values)
