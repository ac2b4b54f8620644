# SPDX-License-Identifier: Apache-2.0
"""What methods on the forward process share as algorithms: a second policy that follows."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

from torch import Generator, Tensor

from chunkgrpo.algorithms.noised_pairs import ForwardLoss
from chunkgrpo.core.times import ChunkTimes
from chunkgrpo.policies.protocol import Policy
from chunkgrpo.runtime.old_policy import OldPolicy
from chunkgrpo.types import SamplingRequest


class ForwardMethod:
    """Begins, ends, saves and restores an iteration of a method that needs clean latents alone.

    Attributes:
        method: Name in checkpoints.
        loss: The objective.
        by_chunk: Whether credit differs by chunk of the times, and so the predictions where chunks
            begin are needed.
        by_ode: Whether rollouts follow the ODE: then no state needs to be stored, and another
            solver may take all steps. Otherwise every step draws noise.
        second: The policy that follows the trained one; None where there is none.
    """

    method: ClassVar[str]
    loss: ForwardLoss
    by_chunk: bool
    by_ode: bool

    @property
    def second(self) -> OldPolicy | None:
        """The policy that follows."""
        return None

    @property
    def updates(self) -> int:
        """Optimizer steps per rollout."""
        return self.loss.updates

    def begin(self, iteration: int, generator: Generator) -> SamplingRequest:
        """Request the clean latents, and the states in the chunks where credit is by chunk."""
        times = self.loss.times
        if self.by_chunk and isinstance(times, ChunkTimes):
            return SamplingRequest(window=times.window, chunk_starts=times.starts)
        return SamplingRequest(window=range(0) if self.by_ode else None)

    def sampling(self, policy: Policy) -> AbstractContextManager[None]:
        """The policy itself samples."""
        return nullcontext()

    def finish(self, policy: Policy, num_updates: int) -> Mapping[str, Any]:
        """Update the second policy."""
        if self.second is not None:
            self.second.update(policy.parameters(), num_updates)
        return {}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the second policy's weights, and whose they are."""
        return ({} if self.second is None else self.second.state()), {"method": self.method}

    def load(self, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
        """Restore what :meth:`state` returned.

        Raises:
            ValueError: If the checkpoint is of another method, whose second policy may have the
                same tensors, or lacks a weight.
        """
        found = info.get("method", "none that trains finished images")
        if found != self.method:
            raise ValueError(
                f"the checkpoint was written by another method than {self.method}: {found}; start "
                "a new run"
            )
        if self.second is not None:
            self.second.load(tensors)
