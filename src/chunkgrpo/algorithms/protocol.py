# SPDX-License-Identifier: Apache-2.0
"""The interface of algorithms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Generator, Tensor

from chunkgrpo.policies.protocol import Policy
from chunkgrpo.types import Experience, LossPart, SamplingRequest


class Algorithm(Protocol):
    """Turns experience into pieces of a loss; owns what it carries from one iteration to the next.

    One iteration calls :meth:`begin`, samples what it requests inside :meth:`sampling`, calls
    :meth:`losses`, and :meth:`finish` after the last optimizer step.

    Attributes:
        updates: Optimizer steps per rollout, at least 1.
    """

    @property
    def updates(self) -> int: ...

    def begin(self, iteration: int, generator: Generator) -> SamplingRequest:
        """Choose what an iteration (counted from 0) samples."""
        ...

    def sampling(self, policy: Policy) -> AbstractContextManager[None]:
        """Inside this context the policy is the one that samples."""
        ...

    def losses(
        self, policy: Policy, experience: Experience, generator: Generator
    ) -> Iterator[LossPart]:
        """Yield the loss in pieces.

        The caller back-propagates each piece as it comes, by
        :meth:`~chunkgrpo.types.LossPart.backward`, and takes an optimizer step after each piece
        that ends an update, before requesting the next one: later pieces are computed with the
        updated policy.
        """
        ...

    def finish(self, policy: Policy, num_updates: int) -> Mapping[str, Any]:
        """End the iteration; return the algorithm's own metrics.

        Args:
            policy: The updated policy.
            num_updates: Optimizer steps of the whole run so far.
        """
        ...

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what a checkpoint must hold: tensors by name, and JSON values."""
        ...

    def load(self, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
        """Restore what :meth:`state` returned; other names are ignored.

        Raises:
            ValueError: If something is missing, as in a checkpoint of another method.
        """
        ...
