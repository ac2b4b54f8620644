# SPDX-License-Identifier: Apache-2.0
"""The interface of policies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from chunkgrpo.types import Conditioning, Prompt, as_prompts


class Policy(Protocol):
    """A flow-matching model with trainable parameters.

    Attributes:
        latent_shape: Shape of one latent.
        device: Device of latents and conditioning.
        reads_images: Whether prompts may have source images.
    """

    latent_shape: tuple[int, ...]
    device: torch.device
    reads_images: ClassVar[bool] = False

    def encode(self, prompts: Sequence[Prompt | str]) -> Conditioning:
        """Encode prompts, one row each, without gradient.

        Args:
            prompts: Texts or records; a record's negative prompt is used instead of the policy's.

        Raises:
            ValueError: If a prompt has images and the policy reads none.
        """
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

    def named_parameters(self) -> dict[str, Tensor]:
        """Return the trainable parameters by name, in the order of :meth:`parameters`."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Inside this context the policy is the base model."""
        ...

    def save(self, folder: str | Path) -> None:
        """Save what was trained, in the format of the model's own library."""
        ...


def without_images(prompts: Iterable[Prompt | str]) -> tuple[Prompt, ...]:
    """Return prompts as records, for a policy that reads no images.

    Raises:
        ValueError: If a prompt has images.
    """
    records = as_prompts(prompts)
    for record in records:
        if record.images:
            raise ValueError(
                f"prompt {record.text!r} has source images, but this policy reads no images; leave "
                "the field images out of its record, or take an image-conditioned model"
            )
    return records
