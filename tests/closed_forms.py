# SPDX-License-Identifier: Apache-2.0
"""Seeded numbers, and closed forms that the tests of several modules compare with."""

import statistics
from itertools import permutations

import torch

from chunkgrpo.core.learned import LearnedSelection
from chunkgrpo.core.plans import ChunkPlan

PLAN = ChunkPlan((2, 3, 4, 7))

SPEED = torch.tensor([0.75, 0.77, 0.53, 0.45, 0.40, 0.37, 0.36, 0.34,
                      0.34, 0.33, 0.32, 0.32, 0.30, 0.28, 0.25, 0.22])  # fmt: skip


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(*shape, seed=0):
    """Standard normal float64."""
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def sets_of_draw(weights: list[float], num_drawn: int) -> dict[tuple[int, ...], float]:
    """Probability of every set of items, by summing over all orders of drawing it."""
    probabilities: dict[tuple[int, ...], float] = {}
    for order in permutations(range(len(weights)), num_drawn):
        probability = 1.0
        for place, item in enumerate(order):
            # Summed anew: subtracting would cancel where one weight dwarfs the others.
            left = sum(w for i, w in enumerate(weights) if i not in order[:place])
            probability *= weights[item] / left
        key = tuple(sorted(order))
        probabilities[key] = probabilities.get(key, 0.0) + probability
    return probabilities


def inclusion_of(sets: dict[tuple[int, ...], float], num_items: int) -> list[float]:
    return [sum(p for chosen, p in sets.items() if item in chosen) for item in range(num_items)]


def learned(usefulness: list[float], **options: float) -> LearnedSelection:
    selection = LearnedSelection(**options)  # type: ignore[arg-type]
    selection.observe(torch.tensor(usefulness))
    return selection


def by_definition(groups, convention):
    """Each convention spelled out with the standard library."""
    batch = [reward for group in groups for reward in group]
    rows = []
    for group in groups:
        mean = statistics.fmean(group)
        centred = [reward - mean for reward in group]
        if convention == "ungrouped":
            mean, scale = statistics.fmean(batch), statistics.stdev(batch) + 1e-8
            rows += [(reward - mean) / scale for reward in group]
            continue
        scale = {
            "group_std": statistics.stdev(group) + 1e-8,
            "group_std_median": statistics.stdev(group) + 1e-8,
            "group_population_std": statistics.pstdev(group) + 1e-4,
            "global_std": statistics.stdev(batch) + 1e-8,
            "flow_grpo": statistics.pstdev(batch) + 1e-4,
            "mean_only": 1.0,
        }[convention]
        row = [value / scale for value in centred]
        if convention == "group_std_median":
            row = [value - statistics.median(row) for value in row]
        rows += row
    return rows
