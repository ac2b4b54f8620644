# SPDX-License-Identifier: Apache-2.0
"""What an algorithm must offer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Generator

from chunkgrpo.policies.protocol import Policy
from chunkgrpo.runtime.old_policy import Old
from chunkgrpo.types import Experience, LossPart


class Algorithm(Protocol):
    """Turns experience into loss pieces; says what a rollout must offer it.

    Attributes:
        needs_trajectory: True where stored states and their densities are read; False where the
            clean latents suffice.
        needs_velocities: True where the sampling policy's velocities are read as well.
        samples_old: True where an old policy samples, not the one that is trained.
        old: That old policy, or one that the loss compares with; None where there is none.
    """

    @property
    def needs_trajectory(self) -> bool: ...

    @property
    def needs_velocities(self) -> bool: ...

    @property
    def samples_old(self) -> bool: ...

    @property
    def old(self) -> Old | None: ...

    def losses(
        self, policy: Policy, experience: Experience, generator: Generator
    ) -> Iterator[LossPart]:
        """Yield the loss in pieces.

        The caller back-propagates each piece as it comes and takes an optimizer step after each
        piece that ends an update, before asking for the next one: later pieces are computed with
        the moved policy.
        """
        ...
