# SPDX-License-Identifier: Apache-2.0
"""How well an image compresses as JPEG: cheap, exact and without a model."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from chunkgrpo.rewards.images import byte_images, check_batch

BYTES_PER_UNIT = 1000.0


def jpeg_kilobytes(images: torch.Tensor, quality: int) -> torch.Tensor:
    """Size of each image as a JPEG file, in units of 1000 bytes; float32 [B].

    Args:
        images: [B, 3, H, W] in [0, 1].
        quality: JPEG quality, 1 to 95.
    """
    from PIL import Image

    sizes = []
    for array in byte_images(images):
        file = io.BytesIO()
        Image.fromarray(array).save(file, format="JPEG", quality=quality)
        sizes.append(file.tell() / BYTES_PER_UNIT)
    return torch.tensor(sizes, dtype=torch.float32)


@dataclass
class JpegIncompressibility:
    """Size of the image as a JPEG file, in kB: more detail, more reward.

    Sizes grow with the number of pixels, so scores of different image sizes do not compare.

    Attributes:
        quality: JPEG quality, 1 to 95.
        name: What metrics are filed under.

    Reference: DDPO, arXiv:2305.13301, section 5.1.
    """

    quality: int = 95
    name: str = "jpeg_incompressibility"

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 95:
            raise ValueError(f"quality is {self.quality}; JPEG quality runs from 1 to 95")

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Score images [B, 3, H, W] in [0, 1]; return float32 [B], above 0."""
        check_batch(images, prompts)
        return jpeg_kilobytes(images, self.quality)


@dataclass
class JpegCompressibility(JpegIncompressibility):
    """Minus the size of the image as a JPEG file, in kB: less detail, more reward.

    Attributes:
        quality: JPEG quality, 1 to 95.
        name: What metrics are filed under.

    Reference: DDPO, arXiv:2305.13301, section 5.1.
    """

    name: str = "jpeg_compressibility"

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Score images [B, 3, H, W] in [0, 1]; return float32 [B], below 0."""
        return -super().__call__(images, prompts)
