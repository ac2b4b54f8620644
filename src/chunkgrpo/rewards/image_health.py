# SPDX-License-Identifier: Apache-2.0
"""The measures of image health as scores: to watch them, or to keep them where they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from chunkgrpo.core.names import OneOf, check_name
from chunkgrpo.report.health import (
    brightness,
    edge_sharpness,
    saturation,
    separation,
    texture,
)
from chunkgrpo.rewards.images import check_batch

ALONE: dict[str, Callable[[Tensor], Tensor]] = {
    "texture": texture,
    "edge_sharpness": edge_sharpness,
    "saturation": saturation,
    "brightness": brightness,
}
"""Measures of single images."""
MEASURES = (*ALONE, "diversity")


@dataclass
class ImageHealthReward:
    """One measure of :mod:`chunkgrpo.report.health`; the prompt does not matter.

    As a watched reward it shows whether training drifts, and listed in ``credit.project_out`` it
    keeps its mean from being trained. ``diversity`` scores an image by its mean distance from the
    others of its group, whose mean over the group is the measure of that name.

    Attributes:
        measure: ``texture``, ``edge_sharpness``, ``saturation``, ``brightness`` or ``diversity``.
        name: What metrics are filed under; the measure where empty.
    """

    measure: Annotated[str, OneOf(MEASURES)] = "brightness"
    name: str = ""

    def __post_init__(self) -> None:
        """Refuse an unknown measure."""
        check_name("measure of image health", self.measure, MEASURES)
        self.name = self.name or self.measure
        self.groupwise = self.measure not in ALONE

    def __call__(self, images: Tensor, prompts: Sequence[str], group_size: int = 1) -> Tensor:
        """Score images [B, 3, H, W] in [0, 1]; return float32 [B]."""
        check_batch(images, prompts)
        pixels = images.detach().float().cpu().clamp(0, 1)
        if self.groupwise:
            return separation(pixels, len(images) // group_size).flatten().to(torch.float32)
        return ALONE[self.measure](pixels).to(torch.float32)
