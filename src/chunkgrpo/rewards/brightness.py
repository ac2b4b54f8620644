# SPDX-License-Identifier: Apache-2.0
"""How bright an image is: a reward for tests and first runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from chunkgrpo.rewards.images import check_batch

LUMA = (0.2126, 0.7152, 0.0722)  # ITU-R BT.709, applied to the stored (gamma-encoded) values


@dataclass
class BrightnessReward:
    r"""Mean luma of the image, in [0, 1]; the prompt does not matter.

    .. math:: r = \frac{1}{HW} \sum_{pixels} 0.2126 R + 0.7152 G + 0.0722 B

    A policy that learns from it must turn white; if it does not, training is broken.

    Attributes:
        name: What metrics are filed under.
    """

    name: str = "brightness"

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Score images [B, 3, H, W] in [0, 1]; return float32 [B]."""
        check_batch(images, prompts)
        means = images.detach().float().mean(dim=(2, 3)).cpu()
        return means @ torch.tensor(LUMA)
