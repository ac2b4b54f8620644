# SPDX-License-Identifier: Apache-2.0
"""Plans against brute force, selections against exact probabilities."""

import math
from itertools import combinations, pairwise, permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkgrpo.core.measured_plans import DIFFERENCES, adaptive_plan, optimal_plan
from chunkgrpo.core.plackett_luce import plackett_luce_inclusion
from chunkgrpo.core.plans import (
    ChunkPlan,
    equal_plan,
    explicit_plan,
    paper_plan,
    step_plan,
    whole_plan,
)
from chunkgrpo.core.selection import (
    ListedSelection,
    UniformSelection,
    WeightedSelection,
    chosen_mask,
    chunk_weights,
    num_selected,
)

sizes_lists = st.lists(st.integers(1, 6), min_size=1, max_size=8)
curves = st.lists(st.floats(0.01, 10.0), min_size=1, max_size=24)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- the plan ---------------------------------------------------------------------------------


def test_the_published_plan_in_detail():
    plan = paper_plan(16)
    assert plan == ChunkPlan((2, 3, 4, 7)) and str(plan) == "[2, 3, 4, 7]"
    assert (plan.num_steps, plan.num_chunks, plan.starts) == (16, 4, (0, 2, 5, 9))
    assert plan.chunk_of_step.tolist() == [0] * 2 + [1] * 3 + [2] * 4 + [3] * 7
    assert plan.chunk_of_step.dtype == torch.long
    assert [list(plan.steps_of(j)) for j in range(3)] == [[0, 1], [2, 3, 4], [5, 6, 7, 8]]
    values = torch.arange(32, dtype=torch.float64).reshape(2, 16)
    assert plan.reduce(values).tolist() == [[0.5, 3.0, 6.5, 12.0], [16.5, 19.0, 22.5, 28.0]]
    expanded = plan.expand(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert expanded.tolist() == [[1.0] * 2 + [2.0] * 3 + [3.0] * 4 + [4.0] * 7]


@given(sizes=sizes_lists)
def test_steps_tile_the_plan(sizes):
    plan = ChunkPlan(tuple(sizes))
    tiled = [step for chunk in range(plan.num_chunks) for step in plan.steps_of(chunk)]
    assert tiled == list(range(plan.num_steps))
    owners = [c for c in range(plan.num_chunks) for _ in plan.steps_of(c)]
    assert plan.chunk_of_step.tolist() == owners


@given(sizes=sizes_lists, seed=st.integers(0, 99))
def test_reduce_is_a_mean_and_a_left_inverse_of_expand(sizes, seed):
    plan = ChunkPlan(tuple(sizes))
    values_BN = torch.randn(3, plan.num_steps, generator=generator(seed), dtype=torch.float64)
    values_BC = torch.randn(3, plan.num_chunks, generator=generator(seed), dtype=torch.float64)
    by_hand = torch.stack(
        [values_BN[:, list(plan.steps_of(c))].mean(1) for c in range(plan.num_chunks)], 1
    )
    assert torch.allclose(plan.reduce(values_BN), by_hand, rtol=1e-12)
    assert torch.allclose(plan.reduce(plan.expand(values_BC)), values_BC, rtol=1e-12)
    assert torch.equal(plan.expand(values_BC), values_BC[:, plan.chunk_of_step])


@given(num_steps=st.integers(1, 20), seed=st.integers(0, 99))
def test_chunks_of_one_reduce_to_the_last_bit(num_steps, seed):
    values = torch.randn(4, num_steps, generator=generator(seed)) * 1e-5
    assert torch.equal(step_plan(num_steps).reduce(values), values)


def test_gradients_flow_through_reduce_and_expand():
    plan = ChunkPlan((1, 2))
    x = torch.ones(1, 3, requires_grad=True)
    plan.expand(plan.reduce(x)).sum().backward()
    assert torch.equal(x.grad, torch.ones(1, 3))


def test_wrong_lengths_are_refused_with_the_fix():
    with pytest.raises(ValueError) as too_long:
        explicit_plan((2, 3, 4, 8), 16)
    assert str(too_long.value) == (
        "chunk sizes (2, 3, 4, 8) sum to 17, but this schedule has 16 trained steps; "
        "shrink a chunk or raise num_steps"
    )
    with pytest.raises(ValueError, match=r"sum to 3.*4 trained steps; grow a chunk or lower"):
        explicit_plan([1, 2], 4)
    with pytest.raises(ValueError, match=r"sum to 3.*2 trained steps"):
        ChunkPlan((1, 2)).reduce(torch.ones(5, 2))
    with pytest.raises(ValueError, match=r"shape \(5, 3\).*its 2 chunks"):
        ChunkPlan((1, 2)).expand(torch.ones(5, 3))
    with pytest.raises(ValueError, match=r"chunk 2 was asked.*chunks 0 to 1"):
        ChunkPlan((1, 2)).steps_of(2)
    assert ChunkPlan((1, 2)).validate_for(3) == ChunkPlan((1, 2))


@pytest.mark.parametrize("sizes", [(), (0,), (2, -1), (1.0, 2), (True, 2)])
def test_malformed_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match="integer >= 1"):
        ChunkPlan(sizes)


# --- plans without measurement ----------------------------------------------------------------


def test_equal_plans_leave_the_rest_at_the_end():
    assert equal_plan(4, 16).sizes == (4, 4, 4, 4)
    assert equal_plan(5, 16).sizes == (5, 5, 5, 1)
    assert equal_plan(16, 16) == whole_plan(16) == ChunkPlan((16,))
    assert equal_plan(1, 16) == step_plan(16) == ChunkPlan((1,) * 16)
    for size in (0, 17):
        with pytest.raises(ValueError, match=f"chunk size is {size}.*1 to 16"):
            equal_plan(size, 16)


@given(size=st.integers(1, 30), num_trained=st.integers(1, 30))
def test_equal_plans_match_torch_split(size, num_trained):
    if size <= num_trained:
        parts = torch.arange(num_trained).split(size)
        assert equal_plan(size, num_trained).sizes == tuple(len(part) for part in parts)


def test_the_published_plan_needs_its_schedule():
    with pytest.raises(ValueError, match=r"16 trained steps.*has 9; set num_steps to 17"):
        paper_plan(9)


# --- the adaptive rule ------------------------------------------------------------------------


def plan_of(values, *args):
    return list(adaptive_plan(torch.tensor(values, dtype=torch.float64), *args).sizes)


def test_first_difference_cuts_where_the_slope_turns():
    # Slopes forward: + + - - - (last step inherits -).
    assert plan_of([1.0, 2.0, 4.0, 3.0, 2.5, 2.4], 4, "forward") == [2, 4]
    # The same turn belongs to one step later when looking backward.
    assert plan_of([1.0, 2.0, 4.0, 3.0, 2.5, 2.4], 3, "backward") == [3, 3]
    # Central: + + + - (4 -> between 2 and 3 is +), - -.
    assert plan_of([1.0, 2.0, 4.0, 3.0, 2.5, 2.4], 3, "central") == [3, 3]


def test_uniform_sign_is_halved_with_the_odd_step_first():
    assert plan_of([5.0, 4.0, 3.0, 2.0, 1.0], 3) == [3, 2]
    assert plan_of([1.0] * 8, 2) == [2, 2, 2, 2]
    assert plan_of([1.0, 2.0, 3.0], 3) == [3]
    assert plan_of([1.0], 1) == [1]


def test_ties_inherit_the_sign_before():
    # Slopes +, 0, 0, -, -: the plateau belongs to the rise.
    assert plan_of([1.0, 2.0, 2.0, 2.0, 1.0, 0.5], 3) == [3, 3]


def test_the_second_level_looks_at_curvature():
    # Falling throughout, so halved: steps 0-3 and 4-7. Second differences, forward: + - - - - -,
    # and the last two inherit -. So the first half is cut after one step; the second has one sign
    # and is halved.
    slopes = [-8.0, -4.0, -5.0, -6.0, -8.0, -12.0, -16.0]
    values = [100.0]
    for slope in slopes:
        values.append(values[-1] + slope)
    assert plan_of(values, 3) == [1, 3, 2, 2]
    assert plan_of(values, 4) == [4, 4]


@pytest.mark.parametrize("difference", DIFFERENCES)
@settings(max_examples=60)
@given(curve=curves, min_size=st.integers(1, 8))
def test_adaptive_plans_cover_the_steps_and_respect_the_limit(difference, curve, min_size):
    plan = adaptive_plan(torch.tensor(curve), min_size, difference)
    assert plan.num_steps == len(curve)
    assert max(plan.sizes) <= min_size


@given(curve=curves, scale=st.sampled_from([0.25, 2.0, 8.0]), min_size=st.integers(1, 6))
def test_adaptive_plans_ignore_the_scale(curve, scale, min_size):
    curve = torch.tensor(curve, dtype=torch.float64)
    assert adaptive_plan(curve, min_size) == adaptive_plan(scale * curve, min_size)


@pytest.mark.parametrize("length", [1, 2, 3, 7])
def test_differences_keep_the_length_and_mark_the_edges(length):
    curve = [float(i * i) for i in range(length)]
    for name, expected in {
        "forward": [2 * i + 1.0 for i in range(length - 1)] + [math.nan],
        "backward": [math.nan] + [2 * i - 1.0 for i in range(1, length)],
        "central": ([math.nan] + [2.0 * i for i in range(1, length - 1)] + [math.nan])[:length],
    }.items():
        assert DIFFERENCES[name](curve) == pytest.approx(expected, nan_ok=True)


def test_bad_curves_are_refused():
    with pytest.raises(ValueError, match=r"shape \(2, 3\).*mean_curve"):
        adaptive_plan(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"curve\[1\] is nan"):
        adaptive_plan(torch.tensor([1.0, math.nan]))
    with pytest.raises(ValueError, match="min_size is 0"):
        adaptive_plan(torch.ones(4), 0)
    with pytest.raises(ValueError, match=r"'sideways'.*backward.*central.*forward"):
        adaptive_plan(torch.ones(4), 2, "sideways")


# --- the optimal plan -------------------------------------------------------------------------


def compositions(num_steps, num_chunks, min_size):
    for cuts in combinations(range(1, num_steps), num_chunks - 1):
        edges = (0, *cuts, num_steps)
        sizes = tuple(b - a for a, b in pairwise(edges))
        if min(sizes) >= min_size:
            yield sizes


def scatter_within(curve, sizes):
    logs = [math.log(value) for value in curve]
    total, start = 0.0, 0
    for size in sizes:
        part = logs[start : start + size]
        centre = sum(part) / size
        total += sum((value - centre) ** 2 for value in part)
        start += size
    return total


@settings(max_examples=60, deadline=None)
@given(
    curve=st.lists(st.floats(0.05, 5.0), min_size=1, max_size=10),
    num_chunks=st.integers(1, 10),
    min_size=st.integers(1, 3),
)
def test_optimal_plans_are_as_good_as_brute_force(curve, num_chunks, min_size):
    every = list(compositions(len(curve), num_chunks, min_size))
    curve_N = torch.tensor(curve, dtype=torch.float64)
    if not every:
        with pytest.raises(ValueError, match="lower min_size or change num_chunks"):
            optimal_plan(curve_N, num_chunks, min_size)
        return
    plan = optimal_plan(curve_N, num_chunks, min_size)
    assert plan.sizes in every
    best = min(scatter_within(curve, sizes) for sizes in every)
    assert scatter_within(curve, plan.sizes) == pytest.approx(best, abs=1e-9)


def test_optimal_plan_finds_plateaus_and_their_number():
    curve = torch.tensor([0.8, 0.8, 0.4, 0.4, 0.4, 0.1, 0.1, 0.1])
    assert optimal_plan(curve).sizes == (2, 3, 3)
    assert optimal_plan(curve, explained=0.0).sizes == (8,)
    assert optimal_plan(torch.full((6,), 0.3)).sizes == (6,)
    assert optimal_plan(curve, 8) == step_plan(8)


@settings(max_examples=40, deadline=None)
@given(
    curve=st.lists(st.floats(0.05, 5.0), min_size=2, max_size=9),
    explained=st.floats(0.0, 1.0),
    min_size=st.integers(1, 2),
)
def test_chosen_number_is_the_fewest_that_explain_enough(curve, explained, min_size):
    plan = optimal_plan(torch.tensor(curve, dtype=torch.float64), None, min_size, explained)
    best = {
        count: min(scatter_within(curve, sizes) for sizes in every)
        for count in range(1, len(curve) // min_size + 1)
        if (every := list(compositions(len(curve), count, min_size)))
    }
    allowed = (1 - explained) * best[1] + 1e-12
    if plan.num_chunks > 1 and best[plan.num_chunks] <= allowed - 1e-9:
        assert all(best[count] > allowed - 1e-9 for count in range(1, plan.num_chunks))
    elif best[plan.num_chunks] > allowed + 1e-9:
        assert best[plan.num_chunks] == pytest.approx(min(best.values()), abs=1e-9)


def test_impossible_requests_of_the_optimal_plan():
    with pytest.raises(ValueError, match=r"smallest entry of the curve is 0.0"):
        optimal_plan(torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="min_size 5; 4 steps can be cut into 1 to 0"):
        optimal_plan(torch.ones(4), min_size=5)
    with pytest.raises(ValueError, match=r"num_chunks is 3 with min_size 2.*1 to 2 chunks"):
        optimal_plan(torch.ones(4), 3, 2)
    with pytest.raises(ValueError, match="min_size is 0"):
        optimal_plan(torch.ones(4), min_size=0)
    with pytest.raises(ValueError, match=r"explained is 1.5"):
        optimal_plan(torch.ones(4), explained=1.5)


# --- selection --------------------------------------------------------------------------------


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
    curve = torch.rand(5, plan.num_steps, generator=generator(1))
    chosen = selection(plan, curve, generator(seed))
    assert chosen.shape == (5, num_selected(plan.num_chunks, 0.5)) and chosen.dtype == torch.long
    assert ((chosen >= 0) & (chosen < plan.num_chunks)).all()
    assert all(len(set(row)) == len(row) for row in chosen.tolist())
    assert torch.equal(chosen, selection(plan, curve, generator(seed)))
    mask = chosen_mask(chosen, plan.num_chunks)
    assert mask.dtype == torch.bool and (mask.sum(1) == chosen.shape[1]).all()
    assert mask.gather(1, chosen).all()


def assert_frequencies(selection, plan, curve_N, expected, draws=40_000):
    chosen = selection(plan, curve_N.expand(draws, -1), generator(3))
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
    chosen = WeightedSelection(1.0)(plan, speed.expand(draws, -1), generator(5))
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
        rows = {tuple(sorted(row)) for row in selection(plan, curve, generator()).tolist()}
        assert len(rows) == math.comb(6, 3)


def test_listed_selection():
    plan, curve = paper_plan(16), torch.ones(3, 16)
    assert ListedSelection((2, 0))(plan, curve, generator()).tolist() == [[2, 0]] * 3
    with pytest.raises(ValueError, match="chunks 0 to 3; list only these"):
        ListedSelection((4,))(plan, curve, generator())
    for indices in ((), (1, 1), (-1,)):
        with pytest.raises(ValueError, match="distinct and >= 0"):
            ListedSelection(indices)


def test_selections_refuse_foreign_curves_and_fractions():
    for selection in (UniformSelection(), WeightedSelection(), ListedSelection((0,))):
        with pytest.raises(ValueError, match="15 trained steps"):
            selection(paper_plan(16), torch.ones(2, 15), generator())
    for kind in (UniformSelection, WeightedSelection):
        with pytest.raises(ValueError, match="fraction is 0"):
            kind(0)


# --- Plackett-Luce ----------------------------------------------------------------------------


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
