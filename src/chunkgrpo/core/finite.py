# SPDX-License-Identifier: Apache-2.0
"""Numbers that are not finite: finding them cheaply, and the error that says where they began."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

PHASES = ("rollout", "reward", "loss", "gradient", "weights", "average", "checkpoint", "evaluation")
"""Where in an iteration a number can go wrong, in the order in which they are looked at."""


class NonFiniteError(ValueError):
    """A number that must be finite is NaN or infinite.

    Attributes:
        phase: One of :data:`PHASES`.
        what: The first tensor concerned: a parameter's name, or a quantity with its place.
        fix: What to lower or to change.
        where: What precedes the message, such as the iteration; may be empty.
        note: What follows it, such as where to go on; may be empty.
    """

    def __init__(self, phase: str, what: str, fix: str, where: str = "", note: str = "") -> None:
        place = f"{where}, {phase}" if where else phase
        text = f"{place}: {what} is not finite; {fix}"
        super().__init__(f"{text}; {note}" if note else text)
        self.phase, self.what, self.fix, self.where, self.note = phase, what, fix, where, note

    def at(self, where: str, note: str = "") -> NonFiniteError:
        """Return the same error with a place, and with what to do now."""
        return NonFiniteError(self.phase, self.what, self.fix, where, note)


def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Say whether every number of some tensors is finite, without waiting for the device.

    By the largest absolute value of each, which is NaN where one is: all tensors of a device are
    read in one call, and nothing of their size is made.

    Args:
        tensors: Of any shapes, types and devices; those of whole numbers are passed over.

    Returns:
        0-dim bool, on the device of the first that is looked at.
    """
    read = [t.detach() for t in tensors if t.is_floating_point() and t.numel()]
    if not read:
        return torch.tensor(True)
    device = read[0].device
    largest = cast(Any, torch)._foreach_norm(read, float("inf"))
    return torch.stack([each.to(device).isfinite() for each in largest]).all()


def first_nonfinite(named: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor with a number that is not finite; None where all are."""
    return next((name for name, tensor in named.items() if not all_finite([tensor])), None)


def finite_rows(*tensors: Tensor) -> Tensor:
    """Say which rows hold finite numbers alone, in each of some tensors.

    Args:
        tensors: [B, ...] each.

    Returns:
        [B] bool.
    """
    rows = [tensor.isfinite().reshape(len(tensor), -1).all(dim=1) for tensor in tensors]
    return torch.stack(rows).all(dim=0)
