# SPDX-License-Identifier: Apache-2.0
"""From fixed prompts and seeds to images and scores."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chunkgrpo.core.finite import finite_rows
from chunkgrpo.core.sde import OdeDiffusion, Transition
from chunkgrpo.policies.protocol import Policy
from chunkgrpo.prompts import PromptSet
from chunkgrpo.report.health import image_health
from chunkgrpo.rewards.images import eight_bit, refuse_nonfinite
from chunkgrpo.rewards.protocol import Reward, RewardError
from chunkgrpo.rewards.scoring import described_problem, usable_scores
from chunkgrpo.rollout import Sampler
from chunkgrpo.runtime.seeds import derive_seed
from chunkgrpo.types import ProgressHook, Prompt


@dataclass(frozen=True)
class Evaluation:
    """Scores of fixed prompts under fixed seeds.

    Attributes:
        prompts: The prompt set, P prompts.
        num_seeds: S images per prompt.
        scores: Scores of each reward, [P, S]; NaN where a lenient one gave none.
        images: uint8 [P * S, 3, H, W], prompt-major.
        health: Image-health figures of all images (see ``report.health``).
    """

    prompts: PromptSet
    num_seeds: int
    scores: dict[str, NDArray[np.float32]]
    images: Tensor
    health: dict[str, float]

    def mean(self, name: str) -> float:
        """Mean score of one reward."""
        return float(self.scores[name].mean())

    def by_group(self, name: str) -> dict[str, NDArray[np.float32]]:
        """Scores of one reward by prompt group, each [prompts of the group * S]."""
        groups = np.array(self.prompts.groups)
        labels = list(dict.fromkeys(self.prompts.groups))
        return {label: self.scores[name][groups == label].ravel() for label in labels}

    def clusters(self) -> dict[str, list[str]]:
        """The prompt of each score of ``by_group``: images of one prompt are not independent."""
        return {
            label: [
                text
                for text, group in zip(self.prompts.texts, self.prompts.groups, strict=True)
                if group == label
                for _ in range(self.num_seeds)
            ]
            for label in dict.fromkeys(self.prompts.groups)
        }


@dataclass(frozen=True)
class EvaluationSettings:
    """How many images are sampled, and what missing scores do.

    Attributes:
        num_seeds: Images per prompt.
        seed: The same seed gives every policy the same initial noise.
        batch_size: Largest number of images at once.
        lenient: Names of rewards whose missing scores become NaN.
        folder: Where images without a usable score are saved; None: nowhere.
        label: Prefix of the names of saved images.
    """

    num_seeds: int = 1
    seed: int = 0
    batch_size: int = 128
    lenient: Collection[str] = ()
    folder: Path | None = None
    label: str = "evaluation-"


def sample_images(
    policy: Policy,
    prompts: Sequence[Prompt | str],
    sigmas: Tensor,
    seeds: Sequence[int],
    batch_size: int = 128,
    progress: ProgressHook | None = None,
    folder: Path | None = None,
    label: str = "",
) -> Tensor:
    """Sample one image per prompt with the deterministic (ODE) sampler.

    Args:
        policy: The policy.
        prompts: P prompts.
        sigmas: [K+1].
        seeds: One per prompt; an image depends on its prompt and seed only.
        batch_size: Largest number of images at once.
        progress: Called with (done, total) images.
        folder: Where an image that is not finite is saved; None: nowhere.
        label: Prefix of its name.

    Returns:
        uint8 [P, 3, H, W].

    Raises:
        NonFiniteError: If a latent or a pixel is not finite, naming the image and its prompt.
    """
    images = []
    # No state of the later steps is stored.
    sampler = Sampler(Transition(OdeDiffusion()), sigmas, window=range(1), batch_size=batch_size)
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        trajectory = sampler.rollout(policy, prompts[part], seeds=seeds[part])
        good = finite_rows(trajectory.final)
        decoded = policy.decode(trajectory.final)
        # Whatever a decoder makes of a latent that is not finite, it is no image.
        decoded = decoded.masked_fill(~good.to(decoded.device)[:, None, None, None], float("nan"))
        refuse_nonfinite(decoded, prompts[part], folder, f"{label}{start}-", "evaluation")
        images.append(eight_bit(decoded).cpu())
        if progress:
            progress(min(start + batch_size, len(prompts)), len(prompts))
    return torch.cat(images)


def evaluate(
    policy: Policy,
    prompts: PromptSet,
    sigmas: Tensor,
    rewards: Sequence[Reward],
    settings: EvaluationSettings | None = None,
    progress: ProgressHook | None = None,
) -> Evaluation:
    """Sample images of every prompt and score each against its own prompt.

    Args:
        policy: The policy.
        prompts: The prompts.
        sigmas: [K+1], of the deterministic sampler.
        rewards: Rewards; each is reported separately.
        settings: See :class:`EvaluationSettings`; one image per prompt where None.
        progress: Called with (done, total) images.

    Raises:
        RewardError: If a reward that is not lenient gives no usable score; it names the reward, the
            prompt and the saved image.
        NonFiniteError: As :func:`sample_images`.
    """
    s = settings or EvaluationSettings()
    repeated = [prompt for prompt in prompts for _ in range(s.num_seeds)]
    seeds = [derive_seed(s.seed, p, i) for p in range(len(prompts)) for i in range(s.num_seeds)]
    images = sample_images(
        policy, repeated, sigmas, seeds, s.batch_size, progress, s.folder, s.label
    )
    scores = {reward.name: [] for reward in rewards}
    # Whole groups, few enough to be held as floats. A remote reward sends them in smaller requests,
    # each with its own deadline, so this size has no effect there.
    size = max(1, 512 // s.num_seeds) * s.num_seeds
    for start in range(0, len(repeated), size):
        part = slice(start, start + size)
        for reward in rewards:
            pictures = images[part].float() / 255
            found, problems = usable_scores(reward, pictures, repeated[part], s.num_seeds)
            if problems and reward.name not in s.lenient:
                first = problems[0]
                name = f"{s.label}{reward.name}-{start + first.index}.png"
                raise RewardError(
                    reward.name,
                    described_problem(first, pictures, repeated[part], s.folder, name),
                )
            scores[reward.name].append(found.numpy())
    shape = (len(prompts), s.num_seeds)
    health = image_health(images.float() / 255, len(prompts) if s.num_seeds > 1 else None)
    joined = {name: np.concatenate(parts).reshape(shape) for name, parts in scores.items()}
    return Evaluation(prompts, s.num_seeds, joined, images, health)
