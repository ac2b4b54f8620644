# SPDX-License-Identifier: Apache-2.0
"""Noise that belongs to a sample, not to a batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from chunkgrpo.runtime.transfer import send


def derive_seed(*parts: int) -> int:
    """Hash integers to one seed below 2^63; close inputs give unrelated outputs."""
    words = np.random.SeedSequence(list(parts)).generate_state(2, np.uint64)
    return int(words[0]) >> 1


class NoiseSource:
    """One random stream per sample, so that batch size and order change nothing.

    Streams run on the CPU whatever the device, so that all devices see the same noise.

    Args:
        seeds: One per sample.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]

    def draw(self, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
        """Draw the next standard normal noise of every sample, [B, *shape] in float32."""
        rows = [torch.randn(shape, generator=generator) for generator in self._generators]
        return send(torch.stack(rows), device)
