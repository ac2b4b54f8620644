# SPDX-License-Identifier: Apache-2.0
"""Image tensors as the rewards need them: checked, and in the 8 bits a saved file would have."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def check_batch(images: Tensor, prompts: Sequence[str]) -> None:
    """Refuse anything but a batch of colour images with one prompt each.

    Raises:
        ValueError: If ``images`` is not [B, 3, H, W] or ``prompts`` has another length than B.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images have shape {tuple(images.shape)}; expected [B, 3, H, W]")
    if len(prompts) != len(images):
        raise ValueError(
            f"{len(images)} images and {len(prompts)} prompts; give one prompt per image"
        )


def rounded(images: Tensor) -> Tensor:
    """Return images in [0, 1] as float32 levels 0, 1, ..., 255, on their device.

    Published rewards were trained on, and score, 8-bit images; a reward must not see more than
    the saved image holds.

    Args:
        images: [B, 3, H, W] in [0, 1]; values outside are clipped.
    """
    return images.detach().float().mul(255).round().clamp(0, 255)


def byte_images(images: Tensor) -> list[np.ndarray]:
    """Return images [B, 3, H, W] in [0, 1] as B arrays [H, W, 3] of ``uint8``, RGB."""
    levels = rounded(images).to("cpu", torch.uint8).permute(0, 2, 3, 1).contiguous()
    return list(levels.numpy())
