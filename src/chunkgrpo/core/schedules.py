# SPDX-License-Identifier: Apache-2.0
"""Sigma grids: where on the way from noise to image the sampler stops.

Time is ``sigma`` in [0, 1]: a state is ``(1 - sigma) * image + sigma * noise``. A grid of K
steps is K+1 sigmas, strictly decreasing, ending at exactly 0. Grids are built and validated
here, once; everything downstream trusts them.

Axes: K sampler steps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from torch import Tensor

from .names import ByKind
from .precision import at_least_float32, host_values

TimestepRounding = Callable[[Tensor], Tensor]
"""How an exact sigma becomes the time the network is told: sigma -> sigma, both in [0, 1]."""


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    r"""Push a grid towards noise (shift > 1) or towards the image (shift < 1).

    .. math:: \sigma = \frac{s\,u}{1 + (s - 1)\,u}

    Fixes 0 and 1 up to rounding, keeps the order, and s = 1 is the identity. Shifts compose by
    multiplication.

    Args:
        sigmas: u in [0, 1], any shape.
        shift: s > 0, finite.

    Returns:
        Shifted sigmas in [0, 1], shape of ``sigmas``, float32 or better.

    Raises:
        ValueError: If ``shift`` is not a positive finite number.

    Reference: Esser et al., arXiv:2403.03206, section 5.3.2 (resolution-dependent shift).
    """
    if not (math.isfinite(shift) and shift > 0):
        raise ValueError(f"shift is {shift}; it must be positive and finite; 1.0 means no shift")
    u = at_least_float32(sigmas)
    return shift * u / (1 + (shift - 1) * u)


def make_sigmas(num_steps: int, shift: float = 3.0) -> Tensor:
    r"""The shifted linear grid: :func:`shift_sigmas` of ``linspace(1, 0, num_steps + 1)``.

    Args:
        num_steps: K >= 2 sampler steps. The last of them is never trained, so K = 17 gives 16
            trained steps.
        shift: s > 0; 3 in the published runs.

    Returns:
        [K+1] float32 on the CPU, from exactly 1.0 down to exactly 0.0.

    Raises:
        ValueError: If ``num_steps`` < 2 or ``shift`` is not positive and finite.

    Reference: Chunk-GRPO, arXiv:2510.21583, section 5.1 (T = 17); DanceGRPO, arXiv:2505.07818.
    """
    if num_steps < 2:
        raise ValueError(
            f"num_steps is {num_steps}; a schedule needs at least 2 steps, because the last one "
            "is never trained; raise num_steps"
        )
    sigmas = shift_sigmas(torch.linspace(1.0, 0.0, num_steps + 1, dtype=torch.float32), shift)
    # s / (1 + (s - 1)) may miss 1 by one rounding, and the first diffusion coefficient asks.
    sigmas[0], sigmas[-1] = 1.0, 0.0
    return validate_sigmas(sigmas)


def validate_sigmas(sigmas: Tensor) -> Tensor:
    """Check a grid once, at the border, and hand it back unchanged.

    Args:
        sigmas: [K+1] floating point; finite, strictly decreasing, first in (0, 1], last
            exactly 0, K >= 2.

    Returns:
        ``sigmas`` itself.

    Raises:
        ValueError: Stating the value found, the rule, and the fix.
    """
    if sigmas.ndim != 1:
        raise ValueError(
            f"sigmas have shape {tuple(sigmas.shape)}; a schedule is one-dimensional, [K+1]; "
            "pass one grid, shared by the batch"
        )
    if not sigmas.is_floating_point():
        raise ValueError(
            f"sigmas have dtype {sigmas.dtype}; they must be floating point in [0, 1]; "
            "divide integer timesteps by 1000"
        )
    if len(sigmas) < 3:
        raise ValueError(
            f"sigmas {host_values(sigmas)} make {max(len(sigmas) - 1, 0)} steps; a schedule needs "
            "at least 2, because the last one is never trained; add sigmas"
        )
    values = host_values(sigmas)
    for index, value in enumerate(values):
        if not math.isfinite(value):
            raise ValueError(
                f"sigmas[{index}] is {value}; every sigma must be finite; rebuild the schedule"
            )
    if not 0 < values[0] <= 1:
        raise ValueError(
            f"sigmas start at {values[0]}; the first sigma must lie in (0, 1]; "
            "scale the grid so that 1 is pure noise"
        )
    if values[-1] != 0:
        raise ValueError(
            f"sigmas end at {values[-1]}; the last sigma must be exactly 0; append 0.0"
        )
    for index in range(len(values) - 1):
        if values[index] <= values[index + 1]:
            raise ValueError(
                f"sigmas[{index}] = {values[index]} is followed by {values[index + 1]}; sigmas "
                "must decrease strictly; sort them in descending order and drop repeats"
            )
    return sigmas


def exact_timestep(sigma: Tensor) -> Tensor:
    """Tell the network the exact sigma.

    Only the network's input is ever rounded; transition means and standard deviations always use
    the exact sigma.

    Args:
        sigma: In [0, 1], any shape.

    Returns:
        ``sigma``, float32 or better.
    """
    return at_least_float32(sigma)


def floor1000_timestep(sigma: Tensor) -> Tensor:
    r"""Tell the network sigma truncated to integer thousandths.

    .. math:: \lfloor 1000\,\sigma \rfloor / 1000

    The published runs feed the network this while the sampler itself uses the exact sigma. A
    sigma within one rounding of a thousandth may land on either side.

    Args:
        sigma: In [0, 1], any shape.

    Returns:
        Multiples of 1/1000 in [0, 1], shape of ``sigma``, float32 or better.

    Reference: the convention of the DanceGRPO line of code, arXiv:2505.07818.
    """
    return torch.floor(1000 * at_least_float32(sigma)) / 1000


TIMESTEP_ROUNDINGS: dict[str, TimestepRounding] = {
    "exact": exact_timestep,
    "floor1000": floor1000_timestep,
}
"""Roundings by the name a configuration uses."""


def merge_sigmas(sigmas: Tensor, sizes: Sequence[int]) -> Tensor:
    """Take several grid steps as one.

    Args:
        sigmas: Schedule, [K+1].
        sizes: How many grid steps each merged step spans; at least 1 each, sum K.

    Returns:
        [len(sizes) + 1], the levels where merged steps begin, and the last.

    Raises:
        ValueError: If the sizes do not cover the schedule.

    Reference: E-GRPO, arXiv:2601.00423 (merging steps so that each explores enough).
    """
    num_steps = len(sigmas) - 1
    if not sizes or min(sizes) < 1 or sum(sizes) != num_steps:
        listed = ", ".join(map(str, sizes))
        raise ValueError(
            f"merged steps ({listed}) sum to {sum(sizes)}, but the schedule has {num_steps} steps; "
            "every size must be at least 1 and all must sum to the number of steps"
        )
    edges = torch.tensor([0, *itertools.accumulate(sizes)], device=sigmas.device)
    return sigmas[edges]


def entropy_merges(
    sigmas: Tensor, std: Callable[[Tensor, Tensor], Tensor], least: float
) -> tuple[int, ...]:
    r"""Merge neighbouring steps until each explores enough.

    From the noise side on, a step takes in the grid steps after it until its Gaussian's entropy
    per latent element reaches ``least``:

    .. math:: h = \tfrac12 \log(2 \pi e\,\nu^2)

    with :math:`\nu` the standard deviation of the one step that spans them. Grid steps at the end
    that do not reach it together stay as they are (sample them without noise), and the last step,
    which is deterministic, is never merged.

    Args:
        sigmas: Schedule, [K+1].
        std: Standard deviation of a step, (sigma, sigma_next) -> scalar tensor, as
            ``Kernel.std``.
        least: Nats per element. A flow SDE's first steps have about 1, its last about -0.4.

    Returns:
        Grid steps per merged step, for :func:`merge_sigmas`; they sum to K.

    Reference: E-GRPO, arXiv:2601.00423, merges consecutive steps of low entropy into one of high
    entropy; the greedy order and a threshold in nats per element are ours.
    """
    last = len(sigmas) - 2  # index of the grid level where the deterministic step begins
    sizes: list[int] = []
    start = 0
    while start < last:
        for end in range(start + 1, last + 1):
            spread = float(std(sigmas[start], sigmas[end]))
            if spread > 0 and 0.5 * math.log(2 * math.pi * math.e * spread**2) >= least:
                break
        else:
            break
        sizes.append(end - start)
        start = end
    return (*sizes, *(1,) * (last + 1 - start))


# --- the choices of a run -----------------------------------------------------------------------


@dataclass(frozen=True)
class Shifted:
    """The linear grid, shifted towards noise (:func:`make_sigmas`).

    Attributes:
        shift: s > 0; 3 in the published runs, and 1 is the linear grid.
    """

    shift: float = 3.0
    kind: Literal["shifted"] = field(default="shifted", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        """Refuse a shift that is none."""
        make_sigmas(2, self.shift)

    def sigmas(self, steps: int) -> Tensor:
        """Return the schedule, [K+1]."""
        return make_sigmas(steps, self.shift)


@dataclass(frozen=True)
class Native:
    """What the stock pipeline uses for this image size; it comes from the loaded model."""

    kind: Literal["native"] = field(default="native", kw_only=True, repr=False)


AnySchedule = Annotated[Shifted | Native, ByKind()]
"""What a run can choose its noise levels from."""

Std = Callable[[Tensor, Tensor], Tensor]
"""Standard deviation of a step, (sigma, sigma_next) -> scalar tensor, as ``Kernel.std``."""


@dataclass(frozen=True)
class NoMerge:
    """Every grid step is a sampler step."""

    kind: Literal["none"] = field(default="none", kw_only=True, repr=False)

    def sizes_of(self, steps: int, sigmas: Tensor | None, std: Std) -> tuple[int, ...] | None:
        """Return None: nothing is merged."""
        return None


@dataclass(frozen=True)
class MergeSizes:
    """Grid steps taken as one, as listed (:func:`merge_sigmas`).

    Attributes:
        sizes: Grid steps per sampler step, e.g. [1, 1, 2, 4, 9]; they sum to the steps.
    """

    sizes: tuple[int, ...]
    kind: Literal["sizes"] = field(default="sizes", kw_only=True, repr=False)

    def sizes_of(self, steps: int, sigmas: Tensor | None, std: Std) -> tuple[int, ...] | None:
        """Return the sizes.

        Raises:
            ValueError: If they do not sum to the steps.
        """
        merge_sigmas(torch.zeros(steps + 1), self.sizes)
        return tuple(self.sizes)


@dataclass(frozen=True)
class MergeEntropy:
    """Neighbouring steps merged until each explores enough (:func:`entropy_merges`).

    Attributes:
        least: Entropy of a merged step, nats per latent element.
    """

    least: float
    kind: Literal["entropy"] = field(default="entropy", kw_only=True, repr=False)

    def sizes_of(self, steps: int, sigmas: Tensor | None, std: Std) -> tuple[int, ...] | None:
        """Return the sizes that the schedule leads to.

        Raises:
            ValueError: If the schedule is not known yet.
        """
        if sigmas is None:
            raise ValueError(
                "merging by entropy needs a schedule that is known before the model is loaded; use "
                "schedule 'shifted', or list the merged steps"
            )
        return entropy_merges(sigmas, std, self.least)


AnyMerge = Annotated[NoMerge | MergeSizes | MergeEntropy, ByKind()]
"""What a run can choose its merged steps from."""
