# SPDX-License-Identifier: Apache-2.0
"""(sample, step) pairs: what goes through the network together in training.

An index that lies elsewhere than what it picks from makes the host wait for the device each time it
is used; so the indices of all micro-batches are planned on the host and sent ahead, in one piece.

Axis names: B samples, S samples of one update, Q pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from chunkgrpo.runtime.transfer import send
from chunkgrpo.types import Experience, Trajectory

Pairs = tuple[Tensor, Tensor]
"""Sample and step (or, on the forward process, time) of Q pairs."""


@dataclass(frozen=True)
class MicroBatch:
    """The pairs of one forward, where they are planned and where they are computed.

    Attributes:
        planned: The pairs on the host.
        pairs: The same on the trajectory's device.
        alike: Where pairs of one prompt are one row of the network: the first pair of each prompt,
            and the row of each pair among these, [Q]. On the device.
    """

    planned: Pairs
    pairs: Pairs
    alike: Pairs | None = None

    @staticmethod
    def place(parts: Sequence[Pairs], trajectory: Trajectory) -> list[MicroBatch]:
        """Send pairs to the device of a trajectory."""
        columns: list[Tensor] = []
        for sample, step in parts:
            columns += [sample, step]
            if trajectory.shared_start and len(step) and bool((step == 0).all()):
                prompt, row = (sample // trajectory.group_size).unique(return_inverse=True)
                first = (row == torch.arange(len(prompt))[:, None]).int().argmax(1)
                columns += [first, row]
            else:
                columns += [step[:0], step[:0]]
        if not columns:
            return []
        flat = send(torch.cat(columns), trajectory.device)
        there = flat.split([len(column) for column in columns])
        return [
            MicroBatch(
                pairs,
                (there[4 * i], there[4 * i + 1]),
                (there[4 * i + 2], there[4 * i + 3]) if len(there[4 * i + 2]) else None,
            )
            for i, pairs in enumerate(parts)
        ]

    def __len__(self) -> int:
        return len(self.planned[0])

    def state(self, trajectory: Trajectory, ahead: int = 0) -> Tensor:
        """Return the states that the pairs start from, or those ``ahead`` steps later."""
        sample, step = self._stored(trajectory)
        return trajectory.state(sample, step + ahead)

    def velocity(self, trajectory: Trajectory) -> Tensor:
        """Return the sampling policy's velocities at the pairs."""
        return trajectory.velocity(*self._stored(trajectory))

    def _stored(self, trajectory: Trajectory) -> Pairs:
        """Return the pairs where states and velocities are stored: on the device or on the host."""
        return self.pairs if trajectory.states.device == trajectory.device else self.planned


def split_pairs(pairs: Pairs, size: int) -> list[Pairs]:
    """Cut pairs into the fewest equal parts of at most ``size``."""
    number = -(-len(pairs[0]) // size)
    if not number:
        return []
    return list(zip(pairs[0].tensor_split(number), pairs[1].tensor_split(number), strict=True))


def split_rows(pairs: Pairs, size: int, trajectory: Trajectory) -> list[Pairs]:
    """Cut pairs into the fewest equal parts of at most ``size`` network rows.

    Where the samples of a prompt start from one state, their first steps are one row: those pairs
    go together, prompt by prompt, and are evaluated once.
    """
    sample, step = pairs
    if not trajectory.shared_start:
        return split_pairs(pairs, size)
    first = step == 0
    prompt = sample[first] // trajectory.group_size
    together = torch.argsort(prompt, stable=True)
    rest = split_pairs((sample[~first], step[~first]), size)
    alike = (sample[first][together], step[first][together])
    distinct = prompt.unique()
    number = -(-len(distinct) // size)
    if not number:
        return rest
    starts = torch.stack([part[0] for part in distinct.tensor_split(number)])
    cuts = torch.searchsorted(prompt[together], starts[1:]).tolist()
    columns = (part.tensor_split(cuts) for part in alike)
    return [*rest, *zip(*columns, strict=True)]


def deal(experience: Experience, updates: int, generator: Generator) -> tuple[Tensor, ...]:
    """Deal the samples that are trained on to optimizer steps at random, [S] each, on the CPU.

    Raises:
        ValueError: If there are fewer samples than updates.
    """
    order = torch.randperm(experience.trajectory.num_samples, generator=generator)
    if experience.chosen is not None:
        order = order[torch.isin(order, experience.chosen.cpu())]
    if updates > len(order):
        raise ValueError(
            f"{updates} updates need as many samples, and {len(order)} samples are trained on"
        )
    return order.tensor_split(updates)


def check_counts(updates: int, micro_batch: int) -> None:
    """Refuse numbers of updates and pairs below 1.

    Raises:
        ValueError: With both numbers.
    """
    if updates < 1 or micro_batch < 1:
        raise ValueError(
            f"updates and micro_batch must be at least 1, got {updates} and {micro_batch}"
        )
