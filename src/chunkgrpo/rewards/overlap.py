# SPDX-License-Identifier: Apache-2.0
"""Scoring images while others are still being sampled.

Images arrive in pieces; each piece is scored as whole groups, at once in a thread of the reward's
own, or when the result is asked for. Both ways make the same calls with the same arguments in the
same order for each reward, so both return the same scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch
from torch import Tensor

from chunkgrpo.rewards.protocol import Reward
from chunkgrpo.rewards.scoring import Scorer
from chunkgrpo.types import Prompt, RewardBatch


class ScoringQueue:
    """Runs the calls of a scorer's rewards; a context manager.

    Args:
        scorer: The rewards.
        overlap: Call each reward in its own thread as images arrive. A reward sees one call
            at a time, but other code runs meanwhile: it must not draw from global random state, or
            change settings of the whole process.
    """

    def __init__(self, scorer: Scorer, overlap: bool = False) -> None:
        self.scorer = scorer
        self.threads = {
            reward.name: ThreadPoolExecutor(1, f"reward {reward.name}")
            for reward in (scorer.everything if overlap else ())
        }

    def __enter__(self) -> ScoringQueue:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for thread in self.threads.values():
            # After an error the other results are not needed, and a reward may hang.
            thread.shutdown(wait=error is None, cancel_futures=True)

    def batch(
        self,
        prompts: Sequence[Prompt | str],
        group_size: int,
        label: str = "",
        watched: bool = True,
    ) -> PendingScores:
        """Begin a batch.

        Args:
            prompts: The prompt of each image to come, prompt-major, B.
            group_size: G.
            label: See :meth:`Scorer.checked`.
            watched: Whether rewards that are only watched score it too.
        """
        scorer = self.scorer
        rewards = scorer.everything if watched else [reward for reward, _ in scorer.rewards]
        return PendingScores(self, rewards, prompts, group_size, label)

    def submit(self, reward: Reward, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Start a call where there are threads; return what waits for its result."""
        thread = self.threads.get(reward.name)
        if thread is None:
            return call
        future: Future[Tensor] = thread.submit(call)
        return future.result


class PendingScores:
    """A batch whose images arrive piece by piece; see :meth:`ScoringQueue.batch`."""

    def __init__(
        self,
        queue: ScoringQueue,
        rewards: Sequence[Reward],
        prompts: Sequence[Prompt | str],
        group_size: int,
        label: str,
    ) -> None:
        self.queue, self.rewards, self.prompts = queue, rewards, prompts
        self.group_size, self.label = group_size, label
        self.waiting: list[Tensor] = []
        self.num_submitted = 0
        self.calls: list[list[Callable[[], Tensor]]] = []

    def add(self, images: Tensor) -> None:
        """Take the next images [M, 3, H, W]; groups that are complete can be scored.

        Raises:
            NonFiniteError: If a pixel is not finite and such images are not dropped.
        """
        self.waiting.append(images)
        number = sum(len(part) for part in self.waiting)
        whole = number - number % self.group_size
        if not whole:
            return
        joined = torch.cat(self.waiting)
        self.waiting = [joined[whole:]] if whole < number else []
        start = self.num_submitted
        self.num_submitted += whole
        prompts = self.prompts[start : start + whole]
        label = f"{self.label}{start}-" if start else self.label
        scorer, size = self.queue.scorer, self.group_size
        piece, bad = scorer.prepare(joined[:whole], prompts, label)

        def call(reward: Reward) -> Callable[[], Tensor]:
            return self.queue.submit(
                reward, lambda: scorer.checked(reward, piece, prompts, size, label, bad)
            )

        self.calls.append([call(reward) for reward in self.rewards])

    def result(self) -> RewardBatch:
        """Wait for all scores.

        Raises:
            RewardError: See :class:`Scorer`.
            ValueError: If images are missing.
        """
        if self.num_submitted != len(self.prompts):
            raise ValueError(
                f"{self.num_submitted} images were added for {len(self.prompts)} prompts; add one "
                "image per prompt"
            )
        pieces = [[wait() for wait in calls] for calls in self.calls]
        columns = {
            reward.name: torch.cat(list(parts))
            for reward, parts in zip(self.rewards, zip(*pieces, strict=True), strict=True)
        }
        return self.queue.scorer.combined(columns)
