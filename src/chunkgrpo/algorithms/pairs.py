# SPDX-License-Identifier: Apache-2.0
"""(sample, step) pairs, and the micro-batches that they form in training.

Indexing a tensor on the device by an index on the host makes the host wait each time; so the
indices of all micro-batches are planned on the host and sent beforehand, in one piece.

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
    """The pairs of one forward, on the host and on the device.

    Attributes:
        planned: The pairs on the host.
        pairs: The same on the trajectory's device.
        alike: Where the pairs of a prompt share one network row: the first pair of each prompt, and
            the row of each pair among these, [Q], on the device; else None.
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
        """Return the states at the pairs' steps, or those ``ahead`` steps later."""
        sample, step = self._stored(trajectory)
        return trajectory.state(sample, step + ahead)

    def velocity(self, trajectory: Trajectory) -> Tensor:
        """Return the old policy's velocities at the pairs."""
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

    Where the samples of a prompt start from one state, their first steps are one row: these pairs
    are grouped by prompt and evaluated once.
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


def deal(
    experience: Experience, updates: int, generator: Generator, whole: bool = False
) -> tuple[Tensor, ...]:
    """Deal the chosen samples to the updates at random, [S] each, on the CPU.

    Args:
        experience: The rollout.
        updates: Optimizer steps.
        generator: On the CPU.
        whole: Keep the samples of a prompt in one update.

    Raises:
        ValueError: If there are fewer samples than updates, or fewer prompts where ``whole``.
    """
    trajectory = experience.trajectory
    if whole:
        return _deal_groups(experience, updates, generator)
    order = torch.randperm(trajectory.num_samples, generator=generator)
    if experience.chosen is not None:
        order = order[torch.isin(order, experience.chosen.cpu())]
    if updates > len(order):
        raise ValueError(
            f"{updates} updates need as many samples, and {len(order)} samples are trained on"
        )
    return order.tensor_split(updates)


def _deal_groups(experience: Experience, updates: int, generator: Generator) -> tuple[Tensor, ...]:
    """Deal whole groups, those without a chosen sample left out."""
    trajectory = experience.trajectory
    samples = torch.arange(trajectory.num_samples)
    if experience.chosen is not None:
        samples = experience.chosen.cpu()
    prompts = samples // trajectory.group_size
    order = torch.randperm(trajectory.num_prompts, generator=generator)
    order = order[torch.isin(order, prompts)]
    if updates > len(order):
        raise ValueError(
            f"{updates} updates need as many prompts where groups share noise, and samples of "
            f"{len(order)} prompts are trained on"
        )
    return tuple(samples[torch.isin(prompts, part)] for part in order.tensor_split(updates))


def check_counts(updates: int, micro_batch: int) -> None:
    """Refuse numbers of updates and pairs below 1.

    Raises:
        ValueError: With both numbers.
    """
    if updates < 1 or micro_batch < 1:
        raise ValueError(
            f"updates and micro_batch must be at least 1, got {updates} and {micro_batch}"
        )
