# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's own image preprocessing, on batches of tensors and on their device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from chunkgrpo.rewards.images import rounded
from chunkgrpo.rewards.loading import load

RESAMPLING = {2: "bilinear", 3: "bicubic"}  # PIL's numbers, which checkpoints store


def resized_levels(levels: Tensor, height: int, width: int, mode: str) -> Tensor:
    """Resize 8-bit levels as PIL does: antialiased, columns then rows, each rounded to 8 bits.

    Args:
        levels: [B, 3, H, W], float32 in 0 ... 255.
        height: Rows of the result.
        width: Columns of the result.
        mode: ``"bilinear"`` or ``"bicubic"``.
    """
    for size in ((levels.shape[-2], width), (height, width)):
        if levels.shape[-2:] != size:
            levels = F.interpolate(levels, size, mode=mode, antialias=True).round().clamp(0, 255)
    return levels


@dataclass(frozen=True)
class Preprocess:
    """Resize, centre crop or pad, and normalise, as an image processor of transformers does.

    Differs from the processor on PIL images by at most one 8-bit level where PIL's fixed-point
    resampling rounds the other way; without resizing, by float rounding alone.

    Attributes:
        mean: Mean of each channel, of values in [0, 1].
        std: Standard deviation of each channel.
        shortest_edge: Length of the shorter side after resizing, its ratio kept; None where
            ``size`` rules.
        size: (height, width) after resizing, ratio not kept; None for no such resizing.
        crop: (height, width) cut from the centre; None for no crop.
        padded: Side of the square that the whole image is fitted into, its ratio kept and its
            longer side as long as the square's; what remains on both sides is black. It rules alone
            where given; None for no padding.
        mode: Resampling, ``"bilinear"`` or ``"bicubic"``.
    """

    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    shortest_edge: int | None = None
    size: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    padded: int | None = None
    mode: str = "bicubic"

    @classmethod
    def from_source(cls, reward: str, source: str | Path) -> Preprocess:
        """Read the settings of a checkpoint's image processor.

        Args:
            reward: Name of the reward, for messages.
            source: Checkpoint folder or hub id.

        Raises:
            OSError: If there is no image processor.
            ValueError: If it does something this class does not.
        """
        from transformers import AutoImageProcessor

        return cls.from_processor(load(reward, source, AutoImageProcessor.from_pretrained))

    @classmethod
    def from_processor(cls, processor: Any) -> Preprocess:
        """Read the settings of an image processor of transformers.

        Raises:
            ValueError: If it pads, resizes by another rule or resamples by another filter.
        """
        on = {
            step: bool(getattr(processor, f"do_{step}", False))
            for step in ("resize", "center_crop", "normalize", "pad")
        }
        kind = type(processor).__name__
        if on["pad"]:
            raise ValueError(f"{kind} pads its images, which is not supported here")
        edge = size = crop = None
        mode = "bicubic"
        if on["resize"]:
            wanted = _lengths(processor.size)
            if set(wanted) == {"height", "width"}:
                size = (wanted["height"], wanted["width"])
            elif set(wanted) == {"shortest_edge"}:
                edge = wanted["shortest_edge"]
            else:
                raise ValueError(
                    f"{kind} resizes to {wanted}; supported are height and width, or shortest_edge"
                )
            if int(processor.resample) not in RESAMPLING:
                raise ValueError(
                    f"{kind} resamples by filter {processor.resample}; supported: {RESAMPLING}"
                )
            mode = RESAMPLING[int(processor.resample)]
        if on["center_crop"]:
            wanted = _lengths(processor.crop_size)
            crop = (wanted["height"], wanted["width"])
        plain = cls()
        return cls(
            mean=tuple(processor.image_mean) if on["normalize"] else plain.mean,
            std=tuple(processor.image_std) if on["normalize"] else plain.std,
            shortest_edge=edge,
            size=size,
            crop=crop,
            mode=mode,
        )

    def padded_to(self, side: int) -> Preprocess:
        """Return the same normalisation after fitting whole images into a square of ``side``."""
        return replace(self, shortest_edge=None, size=None, crop=None, padded=side)

    def resized_size(self, height: int, width: int) -> tuple[int, int]:
        """Return (height, width) after resizing, before the crop or the padding."""
        if self.padded is not None:
            scale = self.padded / max(height, width)
            return max(1, round(height * scale)), max(1, round(width * scale))
        if self.size is not None:
            return self.size
        if self.shortest_edge is None:
            return height, width
        # The longer side is cut to an integer, not rounded, as in the processors.
        edge = self.shortest_edge
        if height <= width:
            return edge, int(edge * width / height)
        return int(edge * height / width), edge

    def __call__(self, images: Tensor) -> Tensor:
        """Return pixel values of images [B, 3, H, W] in [0, 1]; float32, on their device.

        Raises:
            ValueError: If the crop is larger than the resized image.
        """
        levels = rounded(images)
        levels = resized_levels(levels, *self.resized_size(*levels.shape[-2:]), self.mode)
        if self.crop is not None:
            (rows, columns), (height, width) = levels.shape[-2:], self.crop
            if rows < height or columns < width:
                raise ValueError(
                    f"images of {rows} x {columns} are smaller than the crop of "
                    f"{height} x {width}; resize to at least that"
                )
            top, left = (rows - height) // 2, (columns - width) // 2
            levels = levels[..., top : top + height, left : left + width]
        if self.padded is not None:
            rows, columns = (self.padded - length for length in levels.shape[-2:])
            # An odd remainder goes to the right and to the bottom. open_clip pads only what it has
            # resized; an image whose longer side fits already would not fit its model.
            edges = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
            levels = F.pad(levels, edges)
        mean = torch.tensor(self.mean, device=levels.device).view(1, -1, 1, 1)
        std = torch.tensor(self.std, device=levels.device).view(1, -1, 1, 1)
        return (levels / 255 - mean) / std


def _lengths(size: Any) -> dict[str, int]:
    """Return a processor's size as a mapping without empty entries; older files hold a number."""
    if isinstance(size, int):
        return {"height": size, "width": size}
    entries = dict(size) if isinstance(size, Mapping) else dict(vars(size))
    return {name: int(value) for name, value in entries.items() if value}
