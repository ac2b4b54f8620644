# SPDX-License-Identifier: Apache-2.0
"""Evaluations of a run on held-out prompts, by its judge and its other rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from chunkgrpo.evaluate import Evaluation, EvaluationSettings, evaluate
from chunkgrpo.policies.protocol import Policy
from chunkgrpo.prompts import PromptSet
from chunkgrpo.report.statistics import mean_estimate
from chunkgrpo.rewards.protocol import Reward
from chunkgrpo.rewards.scoring import is_groupwise, is_share
from chunkgrpo.types import ProgressHook


@dataclass(frozen=True)
class Evaluator:
    """Samples images of held-out prompts with the deterministic sampler and scores them.

    Attributes:
        held_out: Prompts of the small evaluations while training.
        judge: The reward of the evaluations, in [0, 1] where it is a share.
        sigmas: [K+1], the schedule.
        others: Rewards that are reported too. A groupwise one cannot score single images and is
            left out with one image per prompt.
        lenient: Whether the others may leave images without a score.
        batch_size: Largest number of images at once.
        folder: Where images without a usable score are saved.
    """

    held_out: PromptSet
    judge: Reward
    sigmas: Tensor
    others: Sequence[Reward] = ()
    lenient: bool = False
    batch_size: int = 128
    folder: Path | None = None

    def evaluate(
        self,
        policy: Policy,
        prompts: PromptSet,
        num_seeds: int,
        seed: int,
        label: str = "evaluation-",
        progress: ProgressHook | None = None,
    ) -> Evaluation:
        """Evaluate a policy with its current weights.

        Raises:
            RewardError: If a score of the judge, or unless lenient of any reward, is not usable.
        """
        others = [r for r in self.others if num_seeds > 1 or not is_groupwise(r)]
        unique = list({r.name: r for r in reversed([self.judge, *others])}.values())
        lenient = {r.name for r in unique} - {self.judge.name} if self.lenient else set()
        settings = EvaluationSettings(num_seeds, seed, self.batch_size, lenient, self.folder, label)
        return evaluate(policy, prompts, self.sigmas, unique, settings, progress)

    def summary(
        self, policy: Policy, seed: int, label: str, progress: ProgressHook | None = None
    ) -> dict[str, Any]:
        """Evaluate on the held-out prompts, one image each; return the mean with its interval.

        Its ends are None where nothing bounds them: all scores of a judge of any unit are equal.
        """
        result = self.evaluate(policy, self.held_out, 1, seed, label, progress)
        values = result.scores[self.judge.name]
        found = mean_estimate(values, clusters=self.held_out.texts, share=is_share(self.judge))
        low, high = found.ends
        return {"accuracy": found.estimate, "accuracy_low": low, "accuracy_high": high}
