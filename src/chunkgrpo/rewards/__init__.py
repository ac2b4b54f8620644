# SPDX-License-Identifier: Apache-2.0
"""Rewards: anything that scores images against their prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from chunkgrpo.rewards.protocol import Reward, ask
from chunkgrpo.types import RewardBatch

BUILT_IN = {"shapes": ("chunkgrpo.rewards.shapes", "ShapesReward")}


class FunctionReward:
    """A plain function ``(images, prompts) -> scores`` as a reward."""

    def __init__(self, name: str, function: Any) -> None:
        self.name, self.function = name, function

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images."""
        return torch.as_tensor(self.function(images, prompts), dtype=torch.float32)


def make_reward(name: str, options: Mapping[str, Any] | None = None) -> Reward:
    """Build a reward from its name, or from ``package.module:function``.

    Raises:
        ValueError: If no reward has that name or the import path leads nowhere.
    """
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


def score(
    rewards: Sequence[tuple[Reward, float]],
    images: Tensor,
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]] | None = None,
) -> RewardBatch:
    """Score images with every reward and add them by weight.

    Args:
        rewards: (reward, weight) pairs.
        images: [B, 3, H, W] in [0, 1].
        prompts: B texts.
        metadata: B mappings, for rewards that ask for them (``protocol.ask``).

    Raises:
        ValueError: If a reward returns a wrong shape or a number that is not finite; the message
            names the reward and the first prompt concerned.
    """
    raw: dict[str, Tensor] = {}
    total = torch.zeros(len(prompts))
    for reward, weight in rewards:
        scores = ask(reward, images, prompts, metadata).detach().float().cpu()
        if scores.shape != (len(prompts),):
            raise ValueError(
                f"reward {reward.name!r} returned shape {tuple(scores.shape)} for "
                f"{len(prompts)} images; it must return one score an image"
            )
        bad = (~scores.isfinite()).nonzero()
        if len(bad):
            i = int(bad[0])
            raise ValueError(
                f"reward {reward.name!r} returned {scores[i].item()} for the prompt "
                f"{prompts[i]!r}; scores must be finite"
            )
        raw[reward.name] = scores
        total = total + weight * scores
    return RewardBatch(raw, total)
