# SPDX-License-Identifier: Apache-2.0
"""What a reward is: anything that scores images against their prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch


@runtime_checkable
class Reward(Protocol):
    """A named scorer of images.

    A reward is called with ``images``, a float tensor [B, 3, H, W] in [0, 1] on any device, and
    ``prompts``, the B texts the images were made from, and returns B float32 scores on the CPU,
    larger for better. The call must

    - score each image on its own: a score must not depend on the rest of the batch;
    - give the same score for the same image and prompt, within floating-point error;
    - return finite numbers, also for images of nothing in particular;
    - leave its arguments unchanged and take no gradient.

    The scale is the reward's own; where rewards are combined, their weights balance it.

    Attributes:
        name: Short, of lower-case letters, digits and underscores; metrics are filed under it.
    """

    name: str

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Score images [B, 3, H, W] in [0, 1] against B prompts; return float32 [B]."""
        ...


def ask(
    reward: Reward,
    images: torch.Tensor,
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]] | None = None,
) -> torch.Tensor:
    """Call a reward, with the prompts' metadata where it asks for them.

    Args:
        reward: One whose attribute ``needs_metadata`` is true is called with a third argument.
        images: [B, 3, H, W] in [0, 1].
        prompts: B texts.
        metadata: What the prompts' source says of each, B mappings; empty ones where None.
    """
    if not getattr(reward, "needs_metadata", False):
        return reward(images, prompts)
    given = [{}] * len(prompts) if metadata is None else metadata
    return reward(images, prompts, given)  # type: ignore[call-arg]
