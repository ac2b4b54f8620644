# SPDX-License-Identifier: Apache-2.0
"""A copy of the trainable parameters that follows them slowly, for forward-process methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from chunkgrpo.core.names import check_name
from chunkgrpo.runtime.weights import swapped

DecaySchedule = Callable[[int], float]
"""Optimizer steps so far -> d in [0, 1), the weight of the old parameters."""


def no_decay(step: int) -> float:
    """Follow at once: 0."""
    return 0.0


def nft1_decay(step: int) -> float:
    """Follow ever more slowly, d at most 0.5: min(0.001 step, 0.5).

    Reference: DiffusionNFT, arXiv:2509.16117, published code, type 1.
    """
    return min(0.001 * step, 0.5)


def nft2_decay(step: int) -> float:
    """Follow at once for 75 steps, then ever more slowly: min(0.0075 (step - 75), 0.999).

    Reference: DiffusionNFT, arXiv:2509.16117, published code, type 2.
    """
    return min(max(0.0075 * (step - 75), 0.0), 0.999)


def awm_decay(step: int) -> float:
    """Follow ever more slowly, d at most 0.3: min(0.3, 0.001 step).

    Reference: AWM, arXiv:2509.25050, published code.
    """
    return min(0.3, 0.001 * step)


DECAY_SCHEDULES: dict[str, DecaySchedule] = {
    "none": no_decay,
    "nft1": nft1_decay,
    "nft2": nft2_decay,
    "awm": awm_decay,
}
"""Decay schedules by the name a configuration uses."""


class OldPolicy:
    r"""Keeps :math:`\theta_{old} \leftarrow d\,\theta_{old} + (1-d)\,\theta`, d by schedule.

    Algorithms call :meth:`update` once after the updates of each rollout. Checkpoints need the
    tensors of :meth:`state` only, since d depends on the step alone.

    Args:
        parameters: The parameters to follow, by name; the copy starts equal to them.
        schedule: A name in ``DECAY_SCHEDULES``.

    Raises:
        ValueError: If the schedule is unknown.
    """

    def __init__(self, parameters: Mapping[str, Tensor], schedule: str = "none") -> None:
        check_name("decay schedule", schedule, DECAY_SCHEDULES)
        self.schedule, self.names = schedule, list(parameters)
        self.values = [p.detach().clone() for p in parameters.values()]

    @torch.no_grad()
    def update(self, parameters: Sequence[Tensor], step: int) -> None:
        """Update the copy with the current parameters.

        Args:
            parameters: The policy's parameters, in the order of the constructor.
            step: Number of optimizer steps so far.
        """
        decay = DECAY_SCHEDULES[self.schedule](step)
        torch._foreach_lerp_(self.values, [p.detach() for p in parameters], 1 - decay)

    def applied(self, parameters: Sequence[Tensor]) -> AbstractContextManager[None]:
        """Inside this context the parameters have the old values, and must not be changed."""
        return swapped(parameters, self.values)

    def state(self) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint, named ``old.NAME``."""
        return {f"old.{name}": v for name, v in zip(self.names, self.values, strict=True)}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state` returned; other names are ignored.

        Raises:
            ValueError: If a tensor is missing, as in a checkpoint of another method.
        """
        missing = [name for name in self.state() if name not in tensors]
        if missing:
            raise ValueError(
                f"the checkpoint holds no {missing[0]}; it was written without an old policy or "
                "for another model; start a new run"
            )
        for name, value in self.state().items():
            value.copy_(tensors[name])
