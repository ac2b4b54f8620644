# SPDX-License-Identifier: Apache-2.0
"""What a policy must offer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from chunkgrpo.types import Conditioning


class Policy(Protocol):
    """A flow-matching model with trainable parameters."""

    latent_shape: tuple[int, ...]
    device: torch.device

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts, one row each, without gradient."""
        ...

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Predict dx/dsigma.

        Args:
            x: Latents [M, *latent], float32.
            sigma: Noise level of each row [M] in [0, 1]; rows may differ.
            conditioning: M rows.

        Returns:
            [M, *latent] in float32, with gradient where gradients are on.
        """
        ...

    def decode(self, x: Tensor) -> Tensor:
        """Turn clean latents [M, *latent] into images [M, 3, H, W] in [0, 1], without gradient."""
        ...

    def parameters(self) -> list[Tensor]:
        """Return the trainable parameters, always in the same order."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Inside this context the policy answers as the model it started from."""
        ...

    def save(self, folder: str | Path) -> None:
        """Save what was trained in the form the model's own library loads."""
        ...
