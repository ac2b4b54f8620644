# SPDX-License-Identifier: Apache-2.0
"""Plans cut from curves: rules by hand, optima against brute force."""

import math
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkgrpo.core.measured_plans import (
    DIFFERENCES,
    adaptive_plan,
    explained_variation,
    optimal_plan,
)
from chunkgrpo.core.plans import explicit_plan, step_plan, whole_plan
from closed_forms import PLAN, SPEED

curves = st.lists(st.floats(0.01, 10.0), min_size=1, max_size=24)


# --- the adaptive rule -------------------------------------------------------------------------


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


# --- the optimal plan --------------------------------------------------------------------------


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


# --- what plans are cut from -------------------------------------------------------------------


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
