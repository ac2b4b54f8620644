# SPDX-License-Identifier: Apache-2.0
"""Rewards: anything that scores images against their prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from torch import Tensor

from chunkgrpo.rewards.protocol import GroupwiseReward, Reward, RewardError
from chunkgrpo.rewards.scoring import Scorer, as_scores, score

__all__ = [
    "BUILT_IN",
    "FunctionReward",
    "GroupwiseReward",
    "Reward",
    "RewardError",
    "Scorer",
    "make_reward",
    "score",
]

BUILT_IN = {
    "shapes": ("chunkgrpo.rewards.shapes", "ShapesReward"),
    "clip": ("chunkgrpo.rewards.clip", "ClipReward"),
    "pickscore": ("chunkgrpo.rewards.pickscore", "PickScoreReward"),
    "hpsv2": ("chunkgrpo.rewards.hpsv2", "HpsV2Reward"),
    "hpsv3": ("chunkgrpo.rewards.hpsv3", "HpsV3Reward"),
    "image_reward": ("chunkgrpo.rewards.image_reward", "ImageRewardReward"),
    "aesthetic": ("chunkgrpo.rewards.aesthetic", "AestheticReward"),
    "siglip": ("chunkgrpo.rewards.siglip", "SiglipReward"),
    "ocr": ("chunkgrpo.rewards.ocr", "OcrReward"),
    "geneval": ("chunkgrpo.rewards.geneval", "GenEvalReward"),
    "vlm_judge": ("chunkgrpo.rewards.vlm_judge", "VlmJudgeReward"),
    "jpeg_compressibility": ("chunkgrpo.rewards.jpeg", "JpegCompressibility"),
    "jpeg_incompressibility": ("chunkgrpo.rewards.jpeg", "JpegIncompressibility"),
    "brightness": ("chunkgrpo.rewards.brightness", "BrightnessReward"),
    "remote": ("chunkgrpo.rewards.remote", "RemoteReward"),
}


class FunctionReward:
    """A plain function ``(images, prompts) -> scores`` as a reward.

    A function with an attribute ``groupwise = True`` gets the group size as third argument, see
    :class:`GroupwiseReward`; one with ``needs_metadata = True`` the prompts' metadata, last.
    """

    def __init__(self, name: str, function: Any) -> None:
        self.name, self.function = name, function
        self.groupwise = bool(getattr(function, "groupwise", False))
        self.needs_metadata = bool(getattr(function, "needs_metadata", False))

    def __call__(self, images: Tensor, prompts: Sequence[str], *more: Any) -> Tensor:
        """Score images."""
        return as_scores(self.function(images, prompts, *more), self.name)


def make_reward(name: str, options: Mapping[str, Any] | None = None) -> Reward:
    """Build a reward from its name, from ``package.module:function``, or from a server's address.

    Raises:
        ValueError: If no reward has that name, the import path leads nowhere, or no server answers.
    """
    if name.startswith(("http://", "https://")):
        name, options = "remote", {"url": name, **(options or {})}
    if name in BUILT_IN:
        module, attribute = BUILT_IN[name]
        try:
            return getattr(import_module(module), attribute)(**(options or {}))
        except TypeError as error:
            raise ValueError(f"reward {name!r} does not take these options: {error}") from error
    if ":" in name:
        module, attribute = name.split(":", 1)
        try:
            found = getattr(import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"reward {name!r} can not be imported: {error}") from error
        return FunctionReward(attribute, found)
    known = ", ".join(BUILT_IN)
    raise ValueError(f"unknown reward {name!r}; known: {known}, or package.module:function")
