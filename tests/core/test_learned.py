# SPDX-License-Identifier: Apache-2.0
"""The choice that learns: averages by hand, its floor, its state, and what usefulness means."""

import json
import math
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkgrpo.core.learned import Learned, LearnedSelection, gradient_usefulness, reward_usefulness
from chunkgrpo.core.plans import ChunkPlan, step_plan
from closed_forms import PLAN, SPEED, learned, seeded

# --- learned selection -------------------------------------------------------------------------


def test_nothing_is_preferred_before_anything_was_learnt() -> None:
    for usefulness in (None, [math.nan] * 4, [0.0] * 4, [-1.0, -2.0, 0.0, -0.1]):
        selection = LearnedSelection()
        if usefulness:
            selection.observe(torch.tensor(usefulness))
        assert selection.probabilities(4).tolist() == [0.25] * 4


def test_probabilities_by_hand() -> None:
    selection = learned([3.0, 1.0, 0.0, 0.0], floor=0.2, decay=0.5, power=1.0)
    assert selection.probabilities(4).tolist() == pytest.approx([0.65, 0.25, 0.05, 0.05])
    # The average after a second observation: (0.5 * 0.5 * u1 + 0.5 * u2) / 0.75.
    selection.observe(torch.tensor([0.0, 1.0, 0.0, 3.0]))
    average = [1.0, 1.0, 0.0, 2.0]
    expected = [0.8 * a / 4 + 0.05 for a in average]
    assert selection.probabilities(4).tolist() == pytest.approx(expected)


def test_unmeasured_chunks_keep_their_average_and_new_ones_count_as_the_mean() -> None:
    selection = learned([4.0, math.nan, 2.0], floor=0.5, decay=0.9, power=1.0)
    expected = [0.5 * a / 9 + 0.5 / 3 for a in (4.0, 3.0, 2.0)]
    assert selection.probabilities(3).tolist() == pytest.approx(expected)
    for _ in range(50):
        selection.observe(torch.tensor([math.nan, 6.0, math.nan]))
    expected = [0.5 * a / 12 + 0.5 / 3 for a in (4.0, 6.0, 2.0)]
    assert selection.probabilities(3).tolist() == pytest.approx(expected)


@settings(max_examples=60, deadline=None)
@given(
    rounds=st.lists(
        st.lists(st.floats(-1e30, 1e30) | st.just(math.nan), min_size=5, max_size=5), max_size=6
    ),
    floor=st.floats(0.01, 1.0),
    power=st.floats(0.1, 3.0),
)
def test_no_chunk_starves(rounds: list[list[float]], floor: float, power: float) -> None:
    selection = LearnedSelection(floor=floor, power=power)
    for usefulness in rounds:
        selection.observe(torch.tensor(usefulness, dtype=torch.float64))
    probabilities = selection.probabilities(5)
    assert float(probabilities.min()) >= floor / 5 * (1 - 1e-12)
    assert float(probabilities.sum()) == pytest.approx(1)


@given(scale=st.floats(1e-20, 1e20))
def test_the_unit_of_usefulness_does_not_matter(scale: float) -> None:
    one = learned([3.0, 1.0, 0.5]).probabilities(3)
    selection = LearnedSelection()
    selection.observe(scale * torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64))
    assert selection.probabilities(3).tolist() == pytest.approx(one.tolist(), rel=1e-9)


def test_it_follows_usefulness_that_moves() -> None:
    selection = LearnedSelection(floor=0.1, decay=0.9, power=1.0)
    for _ in range(30):
        selection.observe(torch.tensor([1.0, 0.0]))
    assert selection.probabilities(2)[0] == pytest.approx(0.95)
    for _ in range(30):
        selection.observe(torch.tensor([0.0, 1.0]))
    assert selection.probabilities(2)[0] < 0.1


def test_state_restores_the_draws_through_json() -> None:
    selection = learned([0.1, 0.7, 1 / 3, 2e-9])
    selection.observe(torch.tensor([0.3, math.nan, 0.2, 0.1]))
    other = LearnedSelection()
    other.load(json.loads(json.dumps(selection.state())))
    curve = SPEED.expand(200, -1)
    assert torch.equal(selection.probabilities(4), other.probabilities(4))
    assert torch.equal(selection(PLAN, curve, seeded(1)), other(PLAN, curve, seeded(1)))
    other.load(LearnedSelection().state())
    assert other.state() == {} and other.probabilities(4).tolist() == [0.25] * 4


def test_learned_rows_are_drawn_independently() -> None:
    chosen = learned([1.0] * 6)(step_plan(6), torch.ones(300, 6), seeded())
    assert len({tuple(sorted(row)) for row in chosen.tolist()}) == math.comb(6, 3)


def test_the_power_of_a_half_minimises_variance_at_equal_cost() -> None:
    """One chunk drawn of three: brute force over the simplex finds no better probabilities."""
    squared_norm, cost = [9.0, 2.0, 4.0], [2, 3, 4]
    use = gradient_usefulness(torch.tensor(squared_norm), torch.tensor(cost))
    best = learned(use.tolist(), floor=1e-9).probabilities(3).tolist()

    def variance_times_cost(p: list[float]) -> float:
        variance = sum(g / q for g, q in zip(squared_norm, p))
        return variance * sum(q * c for q, c in zip(p, cost))

    grid = [[i / 40, j / 40, (40 - i - j) / 40] for i, j in combinations(range(1, 39), 2)
            if i + j < 40]  # fmt: skip
    assert variance_times_cost(best) <= min(map(variance_times_cost, grid)) + 1e-9


def test_wrong_settings_and_observations_are_refused() -> None:
    for options, says in (
        ({"fraction": 0.0}, "fraction is 0"),
        ({"floor": 0.0}, "floor is 0"),
        ({"floor": 1.1}, "floor is 1.1"),
        ({"decay": 1.0}, "decay is 1"),
        ({"power": 0.0}, "power is 0"),
    ):
        with pytest.raises(ValueError, match=says):
            LearnedSelection(**options)
    for bad in (torch.ones(2, 2), torch.ones(0), torch.tensor([1.0, math.inf])):
        with pytest.raises(ValueError, match="one finite value per chunk"):
            LearnedSelection().observe(bad)
    selection = learned([1.0, 2.0])
    with pytest.raises(ValueError, match="3 chunks, but 2 were observed"):
        selection.observe(torch.ones(3))
    with pytest.raises(ValueError, match="4 chunks, but 2 were observed"):
        selection(PLAN, SPEED[None], seeded())
    for state in ({"sum": [1.0]}, {"sum": [1.0], "mass": [1.0, 2.0]}):
        with pytest.raises(ValueError, match="load what state"):
            selection.load(state)


# --- usefulness --------------------------------------------------------------------------------


def test_gradient_usefulness() -> None:
    use = gradient_usefulness(torch.tensor([8.0, 3.0, 0.0]), torch.tensor([4, 3, 0]))
    assert use[:2].tolist() == [2.0, 1.0] and use[2].isnan()
    with pytest.raises(ValueError, match="one value per chunk"):
        gradient_usefulness(torch.ones(2), torch.ones(3))


def test_reward_usefulness() -> None:
    log_ratio = torch.tensor([[0.1, 0.2, 9.0], [0.3, -0.4, 9.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    use = reward_usefulness(log_ratio, torch.tensor([1.0, -2.0]), mask)
    assert use[:2].tolist() == pytest.approx([(0.1 - 0.6) / 2, 0.2]) and use[2].isnan()
    by_chunk = torch.tensor([[1.0, 3.0, 0.0], [-2.0, 0.0, 0.0]])
    use = reward_usefulness(log_ratio, by_chunk, mask)
    assert use[:2].tolist() == pytest.approx([-0.25, 0.6])
    with pytest.raises(ValueError, match=r"\[B, C\] and \[B\]"):
        reward_usefulness(log_ratio, torch.ones(3, 2), mask)


def test_reward_usefulness_is_the_gain_per_step_of_a_gaussian_chain() -> None:
    """Two independent steps of unit variance; the reward is what they add up to.

    Moving a step's mean by m raises the expected reward by m. Step 0 is a chunk of its own and
    moves by 0.02, steps 1 and 2 form a chunk and move by 0.01 each: gains per pass 0.02 and 0.01.
    """
    noise = torch.randn(400_000, 3, generator=seeded(3), dtype=torch.float64)
    moves = torch.tensor([0.02, 0.01, 0.01], dtype=torch.float64)
    log_ratio = ChunkPlan((1, 2)).reduce(noise * moves - moves**2 / 2)
    reward = noise.sum(1)
    use = reward_usefulness(log_ratio, reward, torch.ones(400_000, 2, dtype=torch.bool))
    assert use.tolist() == pytest.approx([0.02, 0.01], abs=4e-4)


# --- the settings of a run ----------------------------------------------------------------------


@pytest.mark.parametrize(("usefulness", "power"), [("gradient", 0.5), ("reward", 1.0)])
def test_settings_make_a_selection_that_has_learned_nothing(usefulness, power):
    made = Learned(0.25, 0.3, 0.8, usefulness, True).make()
    assert made == LearnedSelection(0.25, 0.3, 0.8, power, True, usefulness)
    assert made.state() == {} and made.probabilities(4).tolist() == [0.25] * 4
    # Two of one setting do not share what they learn.
    settings_of_both = Learned(usefulness=usefulness)
    first, second = settings_of_both.make(), settings_of_both.make()
    first.observe(torch.tensor([9.0, 4.0]))
    assert first.state() and not second.state()


def test_settings_have_the_defaults_of_the_selection():
    assert Learned().make() == LearnedSelection()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 1.5}, "fraction is 1.5"),
        ({"floor": 0.0}, "floor is 0.0"),
        ({"decay": 1.0}, "decay is 1.0"),
        ({"usefulness": "rewards"}, "unknown usefulness 'rewards'; did you mean 'reward'"),
    ],
)
def test_settings_refuse_what_the_selection_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        Learned(**options)
