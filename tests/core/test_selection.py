# SPDX-License-Identifier: Apache-2.0
"""Every choice of chunks against exact probabilities: enumeration, and a chi-squared test."""

import math
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from chunkgrpo.core.plackett_luce import plackett_luce_inclusion
from chunkgrpo.core.plans import ChunkPlan, paper_plan
from chunkgrpo.core.selection import (
    ListedSelection,
    UniformSelection,
    WeightedSelection,
    chosen_mask,
    chunk_weights,
    importance_weights,
    num_selected,
    unit_weights,
)
from closed_forms import PLAN, SPEED, inclusion_of, learned, seeded, sets_of_draw

sizes_lists = st.lists(st.integers(1, 6), min_size=1, max_size=8)


# --- selection ---------------------------------------------------------------------------------


def test_number_of_selected_chunks():
    assert [num_selected(count, 0.5) for count in (1, 2, 3, 4, 8, 16)] == [1, 1, 1, 2, 4, 8]
    assert (
        num_selected(10, 0.3) == 3 and num_selected(10, 0.7) == 7 and num_selected(100, 0.29) == 29
    )
    assert num_selected(4, 1.0) == 4
    for fraction in (0.0, -0.5, 1.01, math.nan):
        with pytest.raises(ValueError, match=r"\(0, 1\]"):
            num_selected(4, fraction)


@given(count=st.integers(1, 60), percent=st.integers(1, 100))
def test_number_of_selected_chunks_in_integers(count, percent):
    assert num_selected(count, percent / 100) == max(1, count * percent // 100)


@pytest.mark.parametrize(
    "selection", [UniformSelection(), WeightedSelection(), WeightedSelection(softmax=True)]
)
@settings(max_examples=30)
@given(sizes=sizes_lists, seed=st.integers(0, 9))
def test_selections_draw_distinct_chunks_reproducibly(selection, sizes, seed):
    plan = ChunkPlan(tuple(sizes))
    curve = torch.rand(5, plan.num_steps, generator=seeded(1))
    chosen = selection(plan, curve, seeded(seed))
    assert chosen.shape == (5, num_selected(plan.num_chunks, 0.5)) and chosen.dtype == torch.long
    assert ((chosen >= 0) & (chosen < plan.num_chunks)).all()
    assert all(len(set(row)) == len(row) for row in chosen.tolist())
    assert torch.equal(chosen, selection(plan, curve, seeded(seed)))
    mask = chosen_mask(chosen, plan.num_chunks)
    assert mask.dtype == torch.bool and (mask.sum(1) == chosen.shape[1]).all()
    assert mask.gather(1, chosen).all()


def assert_frequencies(selection, plan, curve_N, expected, draws=40_000):
    chosen = selection(plan, curve_N.expand(draws, -1), seeded(3))
    frequency = chosen_mask(chosen, plan.num_chunks).double().mean(0)
    sigma = (expected * (1 - expected) / draws).sqrt()
    assert ((frequency - expected).abs() <= 4.5 * sigma + 1e-12).all()


def test_uniform_frequencies():
    curve = torch.tensor([9.0] * 2 + [1.0] * 14)
    for fraction, expected in ((0.5, 0.5), (0.25, 0.25), (0.75, 0.75)):
        target = torch.full((4,), expected, dtype=torch.float64)
        assert_frequencies(UniformSelection(fraction), paper_plan(16), curve, target)


@pytest.mark.parametrize("softmax", [False, True])
def test_weighted_frequencies_are_plackett_luce(softmax):
    curve = torch.linspace(0.77, 0.22, 16) ** 2
    plan = paper_plan(16)
    weights = chunk_weights(plan, curve[None], softmax)[0]
    for fraction in (0.25, 0.5, 0.75):
        expected = plackett_luce_inclusion(weights, num_selected(4, fraction))
        assert_frequencies(WeightedSelection(fraction, softmax), plan, curve, expected)


def test_weighted_draws_come_in_plackett_luce_order():
    plan, speed = ChunkPlan((1, 1, 1)), torch.tensor([0.6, 0.3, 0.1])
    draws = 60_000
    chosen = WeightedSelection(1.0)(plan, speed.expand(draws, -1), seeded(5))
    for order in permutations(range(3)):
        first, second, _ = order
        expected = speed[first] * speed[second] / (1 - speed[first])
        frequency = (chosen == torch.tensor(order)).all(1).double().mean()
        assert abs(frequency - expected) < 4.5 * math.sqrt(expected / draws)


def test_chunk_weights_by_hand():
    curve = torch.tensor([[1.0, 3.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    plan = ChunkPlan((2, 2))
    weights = chunk_weights(plan, curve)
    assert weights.tolist() == [pytest.approx([2 / 3, 1 / 3]), [0.5, 0.5]]
    expected = [1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))]
    assert chunk_weights(plan, curve, softmax=True)[0].tolist() == pytest.approx(expected)


def test_rows_are_drawn_independently():
    plan, curve = ChunkPlan((1,) * 6), torch.ones(200, 6)
    for selection in (UniformSelection(), WeightedSelection()):
        rows = {tuple(sorted(row)) for row in selection(plan, curve, seeded()).tolist()}
        assert len(rows) == math.comb(6, 3)


def test_listed_selection():
    plan, curve = paper_plan(16), torch.ones(3, 16)
    assert ListedSelection((2, 0))(plan, curve, seeded()).tolist() == [[2, 0]] * 3
    with pytest.raises(ValueError, match="chunks 0 to 3; list only these"):
        ListedSelection((4,))(plan, curve, seeded())
    for indices in ((), (1, 1), (-1,)):
        with pytest.raises(ValueError, match="distinct and >= 0"):
            ListedSelection(indices)


def test_selections_refuse_foreign_curves_and_fractions():
    for selection in (UniformSelection(), WeightedSelection(), ListedSelection((0,))):
        with pytest.raises(ValueError, match="15 trained steps"):
            selection(paper_plan(16), torch.ones(2, 15), seeded())
    for kind in (UniformSelection, WeightedSelection):
        with pytest.raises(ValueError, match="fraction is 0"):
            kind(0)


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


sizes_lists = st.lists(st.integers(1, 6), min_size=1, max_size=8)

KINDS = ("uniform", "weighted", "softmax", "learned")

FRACTIONS = (0.25, 0.5, 0.75, 1.0)


# --- inclusion probabilities -------------------------------------------------------------------


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
    chosen = selection(PLAN, SPEED.expand(draws, -1), seeded(7)).sort(dim=1).values
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
    chosen = other(PLAN, SPEED.expand(draws, -1), seeded(7)).sort(dim=1).values
    statistic = sum(
        (int((chosen == torch.tensor(items)).all(1).sum()) - draws * p) ** 2 / (draws * p)
        for items, p in sets_of_draw(weights, 2).items()
    )
    assert statistic > chi2.ppf(0.999, 5)


def test_listed_chunks_are_certain() -> None:
    selection = ListedSelection((3, 1))
    assert selection.inclusion(PLAN, SPEED.expand(2, -1)).tolist() == [[0.0, 1.0, 0.0, 1.0]] * 2
    chosen = selection(PLAN, SPEED.expand(2, -1), seeded())
    assert selection.loss_weights(PLAN, SPEED.expand(2, -1), chosen).tolist() == [[1.0] * 4] * 2


# --- importance correction ---------------------------------------------------------------------


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
    curve = SPEED * (0.5 + torch.rand(draws, 16, generator=seeded(1)))
    for correction, biased in ((True, False), (False, True)):
        selection = WeightedSelection(0.5, correction=correction)
        chosen = selection(PLAN, curve, seeded(2))
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
    chosen = selection(PLAN, curve, seeded())
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
