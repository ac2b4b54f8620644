# SPDX-License-Identifier: Apache-2.0
"""The interface of rewards, which score images against their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch


class RewardError(ValueError):
    """A reward gave no usable score, for some images (which may then be dropped) or at all.

    See :class:`RewardBroken` for exceptions of the reward's own.

    Attributes:
        reward: The reward's name.
        reason: What happened, without the reward's name.
    """

    def __init__(self, reward: str, reason: str) -> None:
        super().__init__(f"reward {reward!r} {reason}")
        self.reward, self.reason = reward, reason


class RewardBroken(RewardError):
    """A reward raised an exception of its own, which always stops a run."""


@runtime_checkable
class Reward(Protocol):
    """A named scorer of images.

    A reward is called with ``images``, a float tensor [B, 3, H, W] in [0, 1] on any device, and
    ``prompts``, the B texts the images were made from, and returns B float32 scores on the CPU,
    larger for better. The call must

    - score each image independently of the rest of the batch;
    - give the same score for the same image and prompt, within floating-point error;
    - return finite numbers for any image;
    - leave its arguments unchanged and need no gradient (a run passes copies anyway).

    The scale is the reward's own; where rewards are combined, their weights balance it.

    A reward with an attribute ``needs_metadata = True`` gets, as a last argument, the metadata of
    each prompt: B mappings, such as GenEval's ``include`` and ``exclude``. With
    ``share = True`` its scores are shares in [0, 1], and shown in per cent. A
    method ``check_prompts(prompts)`` that raises ValueError refuses prompts it could never score
    before anything is sampled; with ``needs_metadata`` it is ``check_prompts(prompts, metadata)``.

    Attributes:
        name: Short, of lower-case letters, digits and underscores; metrics are filed under it.
    """

    name: str

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Score images [B, 3, H, W] in [0, 1] against B prompts; return float32 [B]."""
        ...


@runtime_checkable
class GroupwiseReward(Protocol):
    """A reward that compares all images of a group, e.g. by their win rates.

    As :class:`Reward`, but a score may depend on the image's group (and on nothing else). It
    is called with whole groups, prompt-major: ``prompts[i * G]`` to ``prompts[i * G + G - 1]`` are
    equal, and the images are in the same order.

    Attributes:
        name: As in :class:`Reward`.
        groupwise: True; this is what tells the two apart.
    """

    name: str
    groupwise: bool

    def __call__(
        self, images: torch.Tensor, prompts: Sequence[str], group_size: int
    ) -> torch.Tensor:
        """Score images [P * G, 3, H, W] in groups of ``group_size``; return float32 [P * G]."""
        ...
