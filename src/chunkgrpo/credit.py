# SPDX-License-Identifier: Apache-2.0
"""From scores to advantages, and to the samples that are trained on.

Axis names: B samples, prompt-major; R rewards; C chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor

from chunkgrpo.core.advantages import CONVENTIONS, Advantages
from chunkgrpo.core.combination import combined_advantages, combined_chunk_advantages
from chunkgrpo.core.finite import NonFiniteError, all_finite
from chunkgrpo.core.names import OneOf, check_name
from chunkgrpo.core.subset import (
    expressive_groups,
    largest_advantages,
    num_chosen,
    project_out,
    scaled_within,
)
from chunkgrpo.rewards.protocol import RewardError
from chunkgrpo.rewards.scoring import jointly_kept
from chunkgrpo.types import RewardBatch

ASSIGNMENTS = ("trajectory", "gain")
"""What determines the advantage of a chunk."""


@dataclass(frozen=True)
class Credit:
    """How scores become advantages, and which samples are trained on.

    Attributes:
        convention: How rewards are normalised within a group.
        clip: Largest absolute advantage, above 0.
        assign: ``trajectory`` credits every chunk with the reward of the image; ``gain`` each
            chunk with what it added to the reward of the predicted clean image.
        keep: Share of a rollout's samples that is trained on, in (0, 1]: those of largest absolute
            advantage.
        project_out: Names of watched rewards, fewer than a group has degrees of freedom (its images
            less one). The advantages of the samples trained on are projected orthogonally to their
            scores, so that at first order no update changes their mean; where one is then larger
            than ``clip``, all are made smaller alike.
    """

    convention: Annotated[str, OneOf(CONVENTIONS)] = "group_std"
    clip: float = 5.0
    assign: Annotated[str, OneOf(ASSIGNMENTS)] = "trajectory"
    keep: float = 1.0
    project_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse unknown names and numbers outside their ranges."""
        check_name("convention of advantages", self.convention, CONVENTIONS)
        check_name("assignment of credit", self.assign, ASSIGNMENTS)
        if not self.clip > 0:
            raise ValueError(f"clip is {self.clip}; the largest absolute advantage must be above 0")
        num_chosen(1, self.keep)
        for name in self.project_out:
            if self.project_out.count(name) > 1:
                raise ValueError(f"project_out names {name!r} twice; once is enough: take one out")

    @property
    def by_chunk(self) -> bool:
        """Whether the clean predictions where chunks begin are scored too."""
        return self.assign == "gain"

    def __call__(
        self, scores: Sequence[RewardBatch], num_prompts: int, updates: int = 1
    ) -> Advantages:
        """Return the advantages of a rollout.

        Args:
            scores: Of the finished images; where :attr:`by_chunk`, of the clean predictions where
                each chunk begins before them, in order.
            num_prompts: P.
            updates: Optimizer steps per rollout; each needs at least one sample.

        Returns:
            Values [B], or [B, C] where credit differs by chunk; ``chosen`` is None where all
            samples are trained on.

        Raises:
            RewardError: If no sample has a usable score at every boundary, or if the dropped ones
                leave every group as few degrees of freedom as scores are projected out.
            NonFiniteError: If an advantage is not finite.
            ValueError: If rewards are so large that their sum overflows.
        """
        final, kept_B = scores[-1], jointly_kept(scores)
        shared = (final.weights, num_prompts, final.combine, self.convention, self.clip, kept_B)
        advantages = combined_advantages(final.stacked, *shared, final.total)
        values = advantages.values
        if self.by_chunk:
            rewards_RBE = torch.stack([each.stacked for each in scores], dim=2)
            totals_BE = torch.stack([each.total for each in scores], dim=1)
            values = combined_chunk_advantages(rewards_RBE, *shared, totals_BE)
        if not all_finite([values]):
            raise NonFiniteError("reward", "an advantage", "lower the weights of the rewards")
        chosen = None
        if self.keep < 1:
            chosen = largest_advantages(values, num_chosen(len(values), self.keep, updates))
        if self.project_out:
            values, able_P = self.projected(values, final, num_prompts, chosen, kept_B)
            lost_P = ~able_P & (advantages.spread.nan_to_num(0.0) > 0)
            silent = advantages.num_zero_spread + lost_P.sum()
            advantages = replace(advantages, num_zero_spread=silent)
        return replace(advantages, values=values, chosen=chosen)

    def projected(
        self,
        values: Tensor,
        final: RewardBatch,
        num_prompts: int,
        chosen: Tensor | None,
        kept_B: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the advantages, orthogonal to the watched scores over the samples trained on.

        And which groups they are of, [P]: one that has too few images left for that has advantage
        0, and counts among those without spread.
        """
        present_B = torch.ones(len(values), dtype=torch.bool) if kept_B is None else kept_B
        able_P = expressive_groups(len(self.project_out), num_prompts, present_B)
        if not able_P.any():
            most = int(present_B.reshape(num_prompts, -1).sum(dim=1).max())
            raise RewardError(
                self.project_out[0],
                f"is projected out, {len(self.project_out)} in all, and no group has more than "
                f"{most} images with a score, {most - 1} degrees of freedom: nothing would be left "
                "to learn; raise sampling.group_size, or shorten credit.project_out",
            )
        able_B = able_P.repeat_interleave(len(values) // num_prompts)
        among = torch.arange(len(values)) if chosen is None else chosen
        among = among[(present_B & able_B)[among]]  # the others have the advantage 0
        watched_RB = torch.stack([final.watched[name] for name in self.project_out])
        left = project_out(values, watched_RB, num_prompts, among)
        return scaled_within(left, self.clip), able_P
