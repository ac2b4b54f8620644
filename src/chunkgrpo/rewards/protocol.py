# SPDX-License-Identifier: Apache-2.0
"""What a reward is: anything that scores images against their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch


class RewardError(ValueError):
    """A reward gave no usable score.

    It may have none for some images, which may be dropped then, or be broken:
    :class:`RewardBroken`.

    Attributes:
        reward: The reward's name.
        reason: What it did instead, without its name.
    """

    def __init__(self, reward: str, reason: str) -> None:
        super().__init__(f"reward {reward!r} {reason}")
        self.reward, self.reason = reward, reason


class RewardBroken(RewardError):
    """A reward raised an exception of its own: no other image will fare better, so it stops a run
    even where images may be dropped."""


@runtime_checkable
class Reward(Protocol):
    """A named scorer of images.

    A reward is called with ``images``, a float tensor [B, 3, H, W] in [0, 1] on any device, and
    ``prompts``, the B texts the images were made from, and returns B float32 scores on the CPU,
    larger for better. The call must

    - score each image on its own: a score must not depend on the rest of the batch;
    - give the same score for the same image and prompt, within floating-point error;
    - return finite numbers, also for images of nothing in particular;
    - leave its arguments unchanged and take no gradient (a run hands out copies all the same).

    The scale is the reward's own; where rewards are combined, their weights balance it.

    A reward with an attribute ``needs_metadata = True`` gets, as a last argument, what the prompts'
    source says of each prompt: B mappings, such as GenEval's ``include`` and ``exclude``. With
    ``share = True`` its scores are shares of what was asked, in [0, 1], and shown in per cent. A
    method ``check_prompts(prompts)`` that raises ValueError refuses prompts it could never score
    before anything is drawn; with ``needs_metadata`` it is ``check_prompts(prompts, metadata)``.

    Attributes:
        name: Short, of lower-case letters, digits and underscores; metrics are filed under it.
    """

    name: str

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Score images [B, 3, H, W] in [0, 1] against B prompts; return float32 [B]."""
        ...


@runtime_checkable
class GroupwiseReward(Protocol):
    """A reward that looks at all images of a prompt together, e.g. their win rates.

    As :class:`Reward`, but a score may depend on the image's own group (and on nothing else). It
    is called with whole groups, prompt-major: ``prompts[i * G]`` to ``prompts[i * G + G - 1]`` are
    equal, and so belong the images.

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
