# SPDX-License-Identifier: Apache-2.0
"""The guard that lets no number that is not finite reach the weights, or the disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from chunkgrpo.core.finite import NonFiniteError, all_finite, first_nonfinite
from chunkgrpo.core.names import ByKind

LOWER_RATE = "lower optimizer.learning_rate"
FIXES = {
    "rollout": f"{LOWER_RATE}, or set model.precision to fp32",
    "reward": f"{LOWER_RATE}, or set model.precision to fp32",
    "loss": f"{LOWER_RATE} or objective.updates; a ratio of form 'full' grows with the number of "
    "latent elements, 'per_dimension' does not",
    "gradient": f"{LOWER_RATE}, or the weights of the loss",
    "weights": LOWER_RATE,
    "average": LOWER_RATE,
    "checkpoint": LOWER_RATE,
    "evaluation": f"{LOWER_RATE}, or set model.precision to fp32",
}
"""What to change, by the phase in which a number went wrong."""

BEFORE_UPDATES = ("rollout", "reward")
"""Phases in which a whole iteration can be left out: no weight has changed yet."""


@dataclass(frozen=True)
class StopNonFinite:
    """The run ends before the step, with nothing written since the last checkpoint."""

    kind: Literal["stop"] = field(default="stop", kw_only=True, repr=False)

    max_skipped: ClassVar[int] = 0


@dataclass(frozen=True)
class SkipNonFinite:
    """The update is left out and counted. Weights that are not finite stop the run all the same.

    Attributes:
        max_skipped: Updates, or whole iterations where images are not finite, that may be left out
            one after the other; one more stops the run. At least 1.
    """

    max_skipped: int = 3
    kind: Literal["skip"] = field(default="skip", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        """Refuse a number that would never skip."""
        if self.max_skipped < 1:
            raise ValueError(
                f"max_skipped is {self.max_skipped}; it must be at least 1; to stop at the first "
                "number that is not finite, set on_nonfinite to stop"
            )


AnyNonFiniteRule = Annotated[StopNonFinite | SkipNonFinite, ByKind()]


def nonfinite(phase: str, what: str) -> NonFiniteError:
    """Return the error of a phase, with the advice of :data:`FIXES`."""
    return NonFiniteError(phase, what, FIXES[phase])


def check_finite(phase: str, named: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are about to be written.

    Raises:
        NonFiniteError: Naming the first one that holds a number that is not finite.
    """
    if not all_finite(named.values()):
        raise nonfinite(phase, str(first_nonfinite(named)))


class FiniteGuard:
    """Looks at every number of an update once, right before the optimizer's step.

    The device is waited for once an update. Weights and averages are looked at after each step, on
    the device; what was found is read before the next step, and at the end of the iteration by
    :meth:`look`.

    Args:
        rule: What to do with an update that is not finite.
        names: Of the parameters, in their order.

    Attributes:
        in_a_row: Updates left out since the last good one; part of a checkpoint.
    """

    def __init__(self, rule: StopNonFinite | SkipNonFinite, names: Sequence[str]) -> None:
        self.rule, self.names = rule, list(names)
        self.in_a_row = 0
        self.stepped: list[tuple[str, Sequence[Tensor], Tensor]] = []

    def refuses(
        self,
        losses: Sequence[Tensor],
        diagnostics: Sequence[Mapping[str, Tensor]],
        gradients: Sequence[Tensor | None],
        norm: Tensor,
    ) -> bool:
        """Say whether an update must be left out.

        Args:
            losses: Of the update's pieces.
            diagnostics: Of the same.
            gradients: Of the parameters, before they are clipped.
            norm: Theirs, all together.

        Raises:
            NonFiniteError: Where something is not finite and the rule is to stop, or too many
                updates were left out before; and always where weights are not.
        """
        numbers = [value for part in diagnostics for value in part.values()]
        ratios = [part[name].exp() for part in diagnostics for name in RATIOS if name in part]
        if self.found(all_finite([*numbers, *ratios, *losses, norm])):
            self.in_a_row = 0
            return False
        self.skip(first_of_update(losses, diagnostics, dict(zip(self.names, gradients))))
        return True

    def found(self, flag: Tensor) -> bool:
        """Read a flag, together with those of the last step.

        Raises:
            NonFiniteError: If a step has made weights or their average infinite.
        """
        flags = [flag, *(flag for _, _, flag in self.stepped)]
        stepped, self.stepped = self.stepped, []
        fine = torch.stack([each.to(flags[-1].device) for each in flags]).tolist()
        for (phase, tensors, _), good in zip(stepped, fine[1:], strict=True):
            if not good:
                named = dict(zip(self.names, tensors, strict=True))
                raise nonfinite(phase, first_nonfinite(named) or "a weight")
        return fine[0]

    def has_stepped(self, weights: Sequence[Tensor], averages: Sequence[Tensor] = ()) -> None:
        """Note the weights after a step, and their averages where there are any."""
        self.stepped = [("weights", weights, all_finite(weights))]
        if averages:
            self.stepped.append(("average", averages, all_finite(averages)))

    def look(self) -> None:
        """Look at the weights after the last step.

        Raises:
            NonFiniteError: If they are not finite.
        """
        if self.stepped:
            self.found(torch.tensor(True))

    def skip(self, error: NonFiniteError) -> None:
        """Count what is left out because of an error.

        Raises:
            NonFiniteError: If nothing may be left out, or no more.
        """
        self.in_a_row += 1
        if self.in_a_row > self.rule.max_skipped:
            before = self.in_a_row - 1
            raise error.at("", f"{before} updates in a row were left out before" if before else "")

    def leave_out(self, error: NonFiniteError) -> None:
        """Leave a whole iteration out whose images are not finite.

        Raises:
            NonFiniteError: If it began to change weights, or no more may be left out.
        """
        if error.phase not in BEFORE_UPDATES:
            raise error
        self.skip(error)


RATIOS = ("log_ratio", "chunk_log_ratio")
"""Diagnostics that are the logarithm of something which must be finite too."""


def first_of_update(
    losses: Sequence[Tensor],
    diagnostics: Sequence[Mapping[str, Tensor]],
    gradients: Mapping[str, Tensor | None],
) -> NonFiniteError:
    """Return the error that names the first number of an update that is not finite.

    First what losses are computed from, piece by piece, then the losses, then gradients.
    """
    for part in diagnostics:
        numbers = {name: value for name, value in part.items() if value.is_floating_point()}
        for name in RATIOS:
            if name in part:
                numbers[name.replace("log_ratio", "ratio")] = part[name].exp()
        name = first_nonfinite(numbers)
        if name is not None:
            return nonfinite("loss", f"{name}{place_in(part, name, numbers[name])}")
    if not all_finite(losses):
        return nonfinite("loss", "the loss")
    given = {name: gradient for name, gradient in gradients.items() if gradient is not None}
    name = first_nonfinite(given)
    if name is not None:
        return nonfinite("gradient", f"the gradient of {name}")
    largest = max(given, key=lambda name: float(given[name].abs().max()))
    return nonfinite("gradient", f"the norm of the gradient, largest in {largest},")


def place_in(part: Mapping[str, Tensor], name: str, values: Tensor) -> str:
    """Return the step or chunk and the sample of the first value that is not finite, as text."""
    index = int((~values.isfinite()).nonzero()[0, 0]) if values.ndim else 0
    key = "chunk" if name.startswith("chunk") else "step"
    if key not in part or not values.ndim or len(part[key]) != len(values):
        return ""
    sample = part.get("sample")
    known = key == "step" and sample is not None
    where = f", sample {int(sample[index])}" if known and sample is not None else ""
    return f" of {key} {int(part[key][index])}{where}"
