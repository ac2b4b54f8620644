# SPDX-License-Identifier: Apache-2.0
"""Exponential moving average of trainable parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class Ema:
    r"""Keeps :math:`\bar\theta \leftarrow d \bar\theta + (1-d) \theta`, with a warm-up of d.

    The decay of update n (from 0) is min(decay, (1 + n) / (10 + n)), so that early averages
    forget the starting point.

    Args:
        parameters: What to follow.
        decay: In [0, 1); 0 follows exactly.
    """

    def __init__(self, parameters: Sequence[Tensor], decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema decay must lie in [0, 1), got {decay}; 0.9 suits short runs")
        self.decay = decay
        self.values = [p.detach().clone() for p in parameters]
        self.num_updates = 0

    @torch.no_grad()
    def update(self, parameters: Sequence[Tensor]) -> None:
        """Move the average towards the parameters."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        torch._foreach_lerp_(self.values, [p.detach() for p in parameters], 1 - decay)
        self.num_updates += 1

    @contextmanager
    def applied(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        """Inside this context the parameters hold the average."""
        kept = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            torch._foreach_copy_(list(parameters), self.values)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(list(parameters), kept)
