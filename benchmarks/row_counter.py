# SPDX-License-Identifier: Apache-2.0
"""Counts the network rows of a training run, which is a budget that other work cannot change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from chunkgrpo.train.loop import Trainer


class RowCounter:
    """Counts the network rows of a trainer, and ends it when a budget is spent.

    Attributes:
        forward: Rows evaluated: one is one latent at one noise level.
        backward: Those of them that a gradient can flow back through.
        iterations: Iterations that have ended.
        done: Whether the budget is spent.
    """

    def __init__(
        self,
        trainer: Trainer,
        budget: float,
        spent: Callable[[RowCounter], float] | None = None,
        after: Callable[[RowCounter], None] = lambda counter: None,
    ) -> None:
        """Watch a trainer.

        Args:
            trainer: It must not be watched already.
            budget: In the unit of ``spent``.
            spent: What has been used of the budget; rows where None.
            after: Called after every iteration.
        """
        self.forward = self.backward = self.iterations = 0
        self.budget, self.done, self.trainer, self.after = budget, False, trainer, after
        self.of_budget = spent or (lambda counter: counter.spent)
        velocity = trainer.policy.velocity

        def counted(x: Any, sigma: Any, conditioning: Any) -> Any:
            result = velocity(x, sigma, conditioning)
            self.forward += len(x)
            self.backward += len(x) if result.requires_grad else 0
            return result

        trainer.policy.velocity = counted
        trainer.on_iteration = self.finished_iteration

    @property
    def spent(self) -> int:
        """Rows, a backward counted as two forwards."""
        return self.forward + 2 * self.backward

    def finished_iteration(self, record: Any) -> None:
        """Stop the trainer where one more iteration would lead away from the budget."""
        self.iterations += 1
        self.after(self)
        spent = self.of_budget(self)
        if spent + 0.5 * spent / self.iterations >= self.budget:
            self.done = self.trainer.stopped = True
