# SPDX-License-Identifier: Apache-2.0
"""Which times of a schedule a finished image is noised to, for objectives of the forward process.

Axes: B samples, T times per sample, K sampler steps, C chunks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

import torch
from torch import Generator, Tensor

from .awm import stratified_times
from .nft import shuffled_times


@dataclass(frozen=True)
class ShuffledTimes:
    """A share of all times, in random order: :func:`~chunkgrpo.core.nft.shuffled_times`.

    Attributes:
        fraction: Share of the schedule's times, in (0, 1].
    """

    fraction: float = 0.99
    kind: Literal["shuffled"] = field(default="shuffled", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        """Refuse a share out of range."""
        self.draw(1, 1, Generator())

    def draw(self, num_steps: int, num_samples: int, generator: Generator) -> Tensor:
        """Return indices into the schedule, [B, T] int64 on the CPU."""
        return shuffled_times(num_steps, self.fraction, num_samples, generator)


@dataclass(frozen=True)
class StratifiedTimes:
    """A few times, spread over the schedule: :func:`~chunkgrpo.core.awm.stratified_times`.

    Attributes:
        number: T, times per sample.
    """

    number: int = 6
    kind: Literal["stratified"] = field(default="stratified", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        """Refuse a number below 1."""
        if self.number < 1:
            raise ValueError(f"number is {self.number}; a sample needs at least one time")

    def draw(self, num_steps: int, num_samples: int, generator: Generator) -> Tensor:
        """Return indices into the schedule, [B, T] int64 on the CPU, each row increasing."""
        return stratified_times(num_steps, self.number, num_samples, generator)


@dataclass(frozen=True)
class ChunkTimes:
    r"""Times from chunks of the schedule, a fixed number from each.

    Chunk c covers the times from :math:`s + \sum_{i<c} k_i` to the next chunk's first. Of its
    :math:`k_c` times, :math:`n_c` different ones are drawn uniformly, each sample on its own. One
    chunk is a window: ``sizes: [5], numbers: [4]`` are four times of the noisier half of ten.

    Attributes:
        sizes: k, times of each chunk.
        numbers: n, how many of them are drawn; 0 leaves a chunk out.
        start: s, the first time of the first chunk; 0 is pure noise.

    Raises:
        ValueError: If a number does not fit its chunk, or nothing would be drawn.
    """

    sizes: tuple[int, ...] = (5,)
    numbers: tuple[int, ...] = (4,)
    start: int = 0
    kind: Literal["chunks"] = field(default="chunks", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        """Refuse numbers that do not fit their chunks."""
        if not self.sizes or min(self.sizes) < 1 or self.start < 0:
            raise ValueError(
                f"sizes are {list(self.sizes)} and start is {self.start}; a chunk has at least one "
                "time, and the first time is 0"
            )
        if len(self.numbers) != len(self.sizes):
            raise ValueError(
                f"numbers has {len(self.numbers)} entries and sizes {len(self.sizes)}; give one "
                "number per chunk"
            )
        if not any(self.numbers) or any(
            not 0 <= number <= size for number, size in zip(self.numbers, self.sizes, strict=True)
        ):
            raise ValueError(
                f"numbers are {list(self.numbers)} of chunks of {list(self.sizes)} times; draw "
                "from 0 to all of each chunk, and from one at least"
            )

    @property
    def starts(self) -> tuple[int, ...]:
        """First time of each chunk, relative to :attr:`start`."""
        return tuple(accumulate(self.sizes[:-1], initial=0))

    @property
    def window(self) -> range:
        """The times of all chunks."""
        return range(self.start, self.start + sum(self.sizes))

    @property
    def chunk_of_slot(self) -> Tensor:
        """Chunk of each column that :meth:`draw` returns, [T] int64."""
        return torch.arange(len(self.sizes)).repeat_interleave(torch.tensor(self.numbers))

    def draw(self, num_steps: int, num_samples: int, generator: Generator) -> Tensor:
        """Return indices into the schedule, [B, T] int64 on the CPU, chunk by chunk.

        Raises:
            ValueError: If the chunks reach past the schedule.
        """
        if self.window.stop > num_steps:
            raise ValueError(
                f"the chunks of times reach from {self.start} to {self.window.stop - 1}, and a "
                f"schedule of {num_steps} steps has the times 0 to {num_steps - 1}; shorten them"
            )
        drawn: list[Tensor] = []
        for begin, size, number in zip(self.starts, self.sizes, self.numbers, strict=True):
            order = torch.rand(num_samples, size, generator=generator).argsort(dim=1)
            drawn.append(self.start + begin + order[:, :number])
        return torch.cat(drawn, dim=1)


AnyTimes = ShuffledTimes | StratifiedTimes | ChunkTimes
