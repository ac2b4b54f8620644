# SPDX-License-Identifier: Apache-2.0
"""Every choice of chunks against exact probabilities: enumeration, and a chi-squared test."""

from __future__ import annotations

import json
import math
from itertools import combinations, permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from chunkgrpo.core.dynamics import DISTANCES, cosine_distance, relative_l1, relative_l2
from chunkgrpo.core.learned import LearnedSelection, gradient_usefulness, reward_usefulness
from chunkgrpo.core.measured_plans import explained_variation, optimal_plan
from chunkgrpo.core.plackett_luce import plackett_luce_inclusion
from chunkgrpo.core.plans import ChunkPlan, explicit_plan, step_plan, whole_plan
from chunkgrpo.core.selection import (
    ListedSelection,
    UniformSelection,
    WeightedSelection,
    chunk_weights,
    importance_weights,
    num_selected,
    unit_weights,
)

PLAN = ChunkPlan((2, 3, 4, 7))
SPEED = torch.tensor([0.75, 0.77, 0.53, 0.45, 0.40, 0.37, 0.36, 0.34,
                      0.34, 0.33, 0.32, 0.32, 0.30, 0.28, 0.25, 0.22])  # fmt: skip


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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


def choices(fraction: float) -> dict[str, tuple]:
    """Each selection with the weights that its draws should follow."""
    by_speed = chunk_weights(PLAN, SPEED[None].double())[0].tolist()
    by_softmax = chunk_weights(PLAN, SPEED[None].double(), softmax=True)[0].tolist()
    # Usefulness 9, 4, 1, 0 with power 1/2 gives shares 3/6, 2/6, 1/6, 0; then a floor of 0.2.
    by_use = [0.8 * share + 0.05 for share in (3 / 6, 2 / 6, 1 / 6, 0)]
    return {
        "uniform": (UniformSelection(fraction), [1.0] * 4),
        "weighted": (WeightedSelection(fraction), by_speed),
        "softmax": (WeightedSelection(fraction, softmax=True), by_softmax),
        "learned": (learned([9.0, 4.0, 1.0, 0.0], fraction=fraction), by_use),
    }


KINDS = ("uniform", "weighted", "softmax", "learned")
FRACTIONS = (0.25, 0.5, 0.75, 1.0)


# --- inclusion probabilities --------------------------------------------------------------------


@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_inclusion_is_that_of_enumeration(kind: str, fraction: float) -> None:
    selection, weights = choices(fraction)[kind]
    num_drawn = num_selected(4, fraction)
    expected = inclusion_of(sets_of_draw(weights, num_drawn), 4)
    inclusion = selection.inclusion(PLAN, SPEED.expand(3, -1))
    assert inclusion.shape == (3, 4) and inclusion.dtype == torch.float64
    for row in inclusion.tolist():
        assert row == pytest.approx(expected, abs=2e-7)  # the curve itself is float32
    assert inclusion.sum(1).tolist() == pytest.approx([num_drawn] * 3, abs=1e-9)


@pytest.mark.parametrize("fraction", (0.25, 0.5, 0.75))
@pytest.mark.parametrize("kind", KINDS)
def test_drawn_sets_pass_a_chi_squared_test(kind: str, fraction: float) -> None:
    selection, weights = choices(fraction)[kind]
    num_drawn, draws = num_selected(4, fraction), 20_000
    expected = sets_of_draw(weights, num_drawn)
    chosen = selection(PLAN, SPEED.expand(draws, -1), generator(7)).sort(dim=1).values
    statistic, total = 0.0, 0
    for items, probability in expected.items():
        observed = int((chosen == torch.tensor(items)).all(1).sum())
        statistic += (observed - draws * probability) ** 2 / (draws * probability)
        total += observed
    assert total == draws
    assert statistic < chi2.ppf(0.999, len(expected) - 1)


def test_a_chi_squared_test_of_this_size_sees_a_small_error() -> None:
    """The same statistic, for draws that follow slightly other weights than claimed."""
    draws, weights = 20_000, [0.25, 0.25, 0.25, 0.25]
    other = learned([1.0, 1.0, 1.0, 0.85], floor=0.01, power=1.0)
    chosen = other(PLAN, SPEED.expand(draws, -1), generator(7)).sort(dim=1).values
    statistic = sum(
        (int((chosen == torch.tensor(items)).all(1).sum()) - draws * p) ** 2 / (draws * p)
        for items, p in sets_of_draw(weights, 2).items()
    )
    assert statistic > chi2.ppf(0.999, 5)


def test_listed_chunks_are_certain() -> None:
    selection = ListedSelection((3, 1))
    assert selection.inclusion(PLAN, SPEED.expand(2, -1)).tolist() == [[0.0, 1.0, 0.0, 1.0]] * 2
    chosen = selection(PLAN, SPEED.expand(2, -1), generator())
    assert selection.loss_weights(PLAN, SPEED.expand(2, -1), chosen).tolist() == [[1.0] * 4] * 2


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


# --- importance correction ----------------------------------------------------------------------


@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("kind", ("weighted", "softmax", "learned"))
def test_corrected_loss_has_the_expectation_of_uniform_selection(
    kind: str, fraction: float
) -> None:
    """Over every set that can be drawn, with its exact probability."""
    selection, weights = choices(fraction)[kind]
    selection = type(selection)(**{**settings_of(selection), "correction": True})
    if kind == "learned":
        selection.observe(torch.tensor([9.0, 4.0, 1.0, 0.0]))
    losses, num_drawn = [0.3, -1.2, 2.5, 0.7], num_selected(4, fraction)
    expected = 0.0
    for items, probability in sets_of_draw(weights, num_drawn).items():
        chosen = torch.tensor([items])
        factor = selection.loss_weights(PLAN, SPEED[None], chosen)[0]
        expected += probability * sum(float(factor[j]) * losses[j] for j in items) / num_drawn
    assert expected == pytest.approx(sum(losses) / 4, abs=2e-6)


def settings_of(selection) -> dict:
    names = ("fraction", "softmax", "floor", "decay", "power")
    return {name: getattr(selection, name) for name in names if hasattr(selection, name)}


def test_corrected_gradient_estimate_is_unbiased_in_a_simulation() -> None:
    """Also with a curve, and so probabilities, of its own for every sample."""
    draws, losses = 40_000, torch.tensor([0.3, -1.2, 2.5, 0.7])
    curve = SPEED * (0.5 + torch.rand(draws, 16, generator=generator(1)))
    for correction, biased in ((True, False), (False, True)):
        selection = WeightedSelection(0.5, correction=correction)
        chosen = selection(PLAN, curve, generator(2))
        factor = selection.loss_weights(PLAN, curve, chosen).gather(1, chosen)
        estimates = (factor * losses[chosen]).mean(1)
        error = abs(float(estimates.mean() - losses.mean()))
        assert (error > 5 * float(estimates.std()) / math.sqrt(draws)) == biased


def test_loss_weights_by_hand() -> None:
    # One of two chunks with weights 3/4 and 1/4: factors (1/2) / (3/4) and (1/2) / (1/4).
    plan, curve = ChunkPlan((1, 1)), torch.tensor([[0.3, 0.1]])
    selection = WeightedSelection(0.5, correction=True)
    factor = selection.loss_weights(plan, curve, torch.tensor([[0]]))
    assert factor.dtype == torch.float32
    assert factor[0].tolist() == pytest.approx([2 / 3, 2.0], rel=1e-6)
    # Where all are drawn there is nothing to correct.
    selection = WeightedSelection(1.0, correction=True)
    assert selection.loss_weights(plan, curve, torch.tensor([[0, 1]])).tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("kind", KINDS)
def test_loss_weights_are_ones_without_correction(kind: str) -> None:
    selection, _ = choices(0.5)[kind]
    curve = SPEED.expand(3, -1)
    chosen = selection(PLAN, curve, generator())
    assert torch.equal(selection.loss_weights(PLAN, curve, chosen), torch.ones(3, 4))


def test_foreign_curves_and_impossible_corrections_are_refused() -> None:
    with pytest.raises(ValueError, match="never chosen cannot be corrected"):
        importance_weights(torch.tensor([[1.0, 0.0]]), 1)
    with pytest.raises(ValueError, match="15 trained steps"):
        unit_weights(PLAN, torch.ones(2, 15))
    for kind in KINDS:
        selection, _ = choices(0.5)[kind]
        with pytest.raises(ValueError, match="15 trained steps"):
            selection.inclusion(PLAN, torch.ones(2, 15))


# --- learned selection --------------------------------------------------------------------------


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
    assert torch.equal(selection(PLAN, curve, generator(1)), other(PLAN, curve, generator(1)))
    other.load(LearnedSelection().state())
    assert other.state() == {} and other.probabilities(4).tolist() == [0.25] * 4


def test_learned_rows_are_drawn_independently() -> None:
    chosen = learned([1.0] * 6)(step_plan(6), torch.ones(300, 6), generator())
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
        selection(PLAN, SPEED[None], generator())
    for state in ({"sum": [1.0]}, {"sum": [1.0], "mass": [1.0, 2.0]}):
        with pytest.raises(ValueError, match="load what state"):
            selection.load(state)


# --- usefulness ---------------------------------------------------------------------------------


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
    noise = torch.randn(400_000, 3, generator=generator(3), dtype=torch.float64)
    moves = torch.tensor([0.02, 0.01, 0.01], dtype=torch.float64)
    log_ratio = ChunkPlan((1, 2)).reduce(noise * moves - moves**2 / 2)
    reward = noise.sum(1)
    use = reward_usefulness(log_ratio, reward, torch.ones(400_000, 2, dtype=torch.bool))
    assert use.tolist() == pytest.approx([0.02, 0.01], abs=4e-4)


# --- what plans are cut from --------------------------------------------------------------------


def test_distances_by_name() -> None:
    assert list(DISTANCES) == ["l1", "l2", "cosine"]
    assert list(DISTANCES.values()) == [relative_l1, relative_l2, cosine_distance]


def test_explained_variation() -> None:
    curve = torch.tensor([4.0, 4.0, 1.0, 1.0])
    assert explained_variation(curve, explicit_plan((2, 2), 4)) == pytest.approx(1.0)
    assert explained_variation(curve, whole_plan(4)) == pytest.approx(0.0)
    # Logs (0, 0, 1, 3) around 1: total 6; chunks of two leave 0 and 2.
    curve = torch.tensor([0.0, 0.0, 1.0, 3.0], dtype=torch.float64).exp()
    assert explained_variation(curve, explicit_plan((2, 2), 4)) == pytest.approx(2 / 3)
    assert explained_variation(torch.full((3,), 0.2), whole_plan(3)) == 1.0
    assert explained_variation(SPEED, optimal_plan(SPEED)) >= 0.95
    assert explained_variation(SPEED, optimal_plan(SPEED, 4)) >= explained_variation(SPEED, PLAN)
    with pytest.raises(ValueError, match="logarithms need speeds above 0"):
        explained_variation(torch.tensor([1.0, 0.0]), whole_plan(2))
