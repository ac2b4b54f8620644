# SPDX-License-Identifier: Apache-2.0
"""Inclusion probabilities against sums over all orders of drawing."""

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkgrpo.core.plackett_luce import plackett_luce_inclusion
from closed_forms import inclusion_of, sets_of_draw


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.05, 4.0), min_size=1, max_size=5), st.integers(0, 5))
def test_inclusion_equals_the_sum_over_orders(weights, num_drawn):
    num_drawn = min(num_drawn, len(weights))
    expected = [0.0] * len(weights)
    for order in permutations(range(len(weights)), num_drawn):
        probability, left = 1.0, sum(weights)
        for item in order:
            probability *= weights[item] / left
            left -= weights[item]
        for item in order:
            expected[item] += probability
    inclusion = plackett_luce_inclusion(torch.tensor(weights, dtype=torch.float64), num_drawn)
    assert inclusion.tolist() == pytest.approx(expected, abs=1e-9)
    assert inclusion.sum().item() == pytest.approx(num_drawn)


def test_inclusion_of_one_and_of_all():
    weights = torch.tensor([3.0, 1.0, 1.0])
    assert plackett_luce_inclusion(weights, 1).tolist() == pytest.approx([0.6, 0.2, 0.2])
    assert plackett_luce_inclusion(weights, 3).tolist() == pytest.approx([1.0, 1.0, 1.0])


def test_inclusion_refuses_impossible_requests():
    with pytest.raises(ValueError, match="positive and finite"):
        plackett_luce_inclusion(torch.tensor([1.0, 0.0]), 1)
    with pytest.raises(ValueError, match="allow 0 to 2 draws"):
        plackett_luce_inclusion(torch.ones(2), 3)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=6),
    st.integers(0, 6),
)
def test_inclusion_is_exact_for_weights_of_any_size(weights: list[float], num_drawn: int) -> None:
    num_drawn = min(num_drawn, len(weights))
    expected = inclusion_of(sets_of_draw(weights, num_drawn), len(weights))
    inclusion = plackett_luce_inclusion(torch.tensor(weights, dtype=torch.float64), num_drawn)
    # Relative, for weights are divided by the smallest probabilities too.
    assert inclusion.tolist() == pytest.approx(expected, rel=1e-9)


def test_rows_have_their_own_inclusion() -> None:
    rows = torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]])
    together = plackett_luce_inclusion(rows, 2)
    assert together[1].tolist() == pytest.approx([2 / 3] * 3, abs=1e-12)
    assert together[0].tolist() == pytest.approx(
        inclusion_of(sets_of_draw([1.0, 2.0, 3.0], 2), 3), abs=1e-12
    )


def test_inclusion_of_a_chunk_per_step_of_a_long_schedule() -> None:
    equal = plackett_luce_inclusion(torch.ones(49), 24)
    assert equal.tolist() == pytest.approx([24 / 49] * 49, abs=1e-13)
    # Two kinds of items: the identity sum = M fixes one probability from the other.
    weights = torch.tensor([3.0] * 10 + [1.0] * 20)
    mixed = plackett_luce_inclusion(weights, 7)
    assert mixed.sum().item() == pytest.approx(7, abs=1e-12)
    assert mixed[:10].tolist() == pytest.approx([mixed[0].item()] * 10, abs=1e-14)
    assert mixed[0] > 7 / 30 > mixed[-1]
