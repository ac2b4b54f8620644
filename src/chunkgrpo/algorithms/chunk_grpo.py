# SPDX-License-Identifier: Apache-2.0
"""Chunk-GRPO (arXiv:2510.21583): sample step by step, optimise chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Generator, Tensor

from chunkgrpo.algorithms.chunk_loss import ChunkLoss, Chunks
from chunkgrpo.algorithms.observing import ChunkObserver
from chunkgrpo.core.learned import LearnedSelection
from chunkgrpo.core.plans import ChunkPlan
from chunkgrpo.core.sde import Kernel
from chunkgrpo.core.selection import Selection, UniformSelection
from chunkgrpo.core.windows import AllSteps, WindowSchedule
from chunkgrpo.policies.protocol import Policy
from chunkgrpo.types import Experience, LossPart, SamplingRequest


@dataclass
class ChunkGRPO:
    """One clipped importance ratio per chunk of steps.

    With chunks of one step this is step-level GRPO, with one chunk of all steps its sequence-level
    variant.

    Args:
        plan: Chunks of all trainable steps, or of a window's.
        transition: The one the rollout uses.
        loss: The objective.
        selection: Which chunks of a sample are trained on; a learned one has a state, which
            checkpoints contain.
        window: Which steps are stochastic and trained on.
        num_trained: N, the trainable steps; None: those of the plan.
        recut: Returns a plan cut anew from the policy's measured dynamics.
        refresh: Iterations between calls of ``recut``; with 0 the plan stays.
        velocities: Store the old policy's velocities in every rollout.

    Raises:
        ValueError: If the transition has no density, or the window or the weights do not fit.
    """

    plan: ChunkPlan
    transition: Kernel
    loss: ChunkLoss = field(default_factory=ChunkLoss)
    selection: Selection = field(default_factory=UniformSelection)
    window: WindowSchedule = field(default_factory=AllSteps)
    num_trained: int | None = None
    recut: Callable[[], ChunkPlan] | None = None
    refresh: int = 0
    velocities: bool = False

    def __post_init__(self) -> None:
        if not self.transition.has_density:
            raise ValueError(
                "Chunk-GRPO needs a density of each trained step, and an ODE step (eta 0) has "
                "none; use a flow or dance diffusion with eta > 0"
            )
        self.steps = self.plan.num_steps if self.num_trained is None else self.num_trained
        self.plan.validate_for(self.window.num_planned(self.steps))
        self.window.places(self.plan, self.steps)
        self.loss.outer_weights.check(self.plan)
        selection = self.selection
        self.learned = selection if isinstance(selection, LearnedSelection) else None
        self.present = self.plan
        self.observer: ChunkObserver | None = None

    @property
    def updates(self) -> int:
        """Optimizer steps per rollout."""
        return self.loss.updates

    def begin(self, iteration: int, generator: Generator) -> SamplingRequest:
        """Choose the window of an iteration and the chunks within it."""
        if self.recut and self.refresh and iteration and not iteration % self.refresh:
            self.plan = self.recut()
        window, self.present = self.window.choose(iteration, self.plan, self.steps, generator)
        if self.learned is not None:
            self.observer = ChunkObserver(self.present, self.learned)
        keep = self.velocities or self.loss.needs_velocities
        return SamplingRequest(
            window=window if len(window) < self.steps else None,
            keep_velocities=keep,
            chunk_starts=self.present.starts,
        )

    def sampling(self, policy: Policy) -> AbstractContextManager[None]:
        """The policy itself samples."""
        return nullcontext()

    def losses(
        self, policy: Policy, experience: Experience, generator: Generator
    ) -> Iterator[LossPart]:
        """Yield pieces of ``updates`` losses; see :class:`~.protocol.Algorithm`."""
        observer = self.observer
        apart = observer is not None and observer.kind == "gradient"
        chunks = Chunks(self.present, self.selection, self.transition, apart)
        for part in self.loss.parts(policy, experience, chunks, generator):
            yield part if observer is None else observer.observed(part, policy.parameters())

    def finish(self, policy: Policy, num_updates: int) -> Mapping[str, Any]:
        """Update a learned selection; return the chunks and their new probabilities."""
        metrics: dict[str, Any] = {"chunks": list(self.present.sizes)}
        if self.learned is not None and self.observer is not None:
            self.learned.observe(self.observer.usefulness())
            chances = self.learned.probabilities(self.present.num_chunks)
            metrics["chunk_probability"] = chances.tolist()
        return metrics

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the plan and the state of a learned selection."""
        info: dict[str, Any] = {"chunks": list(self.plan.sizes)}
        if self.learned is not None:
            info["learned"] = self.learned.state()
        return {}, info

    def load(self, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
        """Restore what :meth:`state` returned.

        Raises:
            ValueError: If the checkpoint holds no chunks.
        """
        if "chunks" not in info:
            raise ValueError(
                "the checkpoint holds no chunks; it was written by another method; start a new run"
            )
        self.plan = self.present = ChunkPlan(tuple(info["chunks"]))
        if self.learned is not None:
            self.learned.load(info.get("learned", {}))
