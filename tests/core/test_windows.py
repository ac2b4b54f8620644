# SPDX-License-Identifier: Apache-2.0
"""Window schedules against positions written out by hand, and the errors that guard them.

MixGRPO (arXiv:2507.21802, section 4): a window of w steps moves from high to low noise and starts
over; it stays at a start l for ceil(tau * exp(-k * relu(l - l0))) iterations.
"""

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch

from chunkgrpo.core.plans import ChunkPlan, paper_plan, restrict_plan
from chunkgrpo.core.windows import AllSteps, ChunkWindow, FixedWindow, RandomWindow, SlidingWindow
from oracles import seeded

# Upper 0.1 % points of chi-squared, by degrees of freedom.
CHI_SQUARED = {3: 16.27, 5: 20.52, 8: 26.12}


def starts_of(schedule, iterations, seed=0):
    """Starts of consecutive iterations; every window must have the schedule's size."""
    generator = seeded(seed)
    windows = [schedule(iteration, generator) for iteration in range(iterations)]
    assert {len(window) for window in windows} == {schedule.size}
    assert {window.step for window in windows} == {1}
    return [window.start for window in windows]


def assert_uniform(draws, choices):
    """Pearson's test at 0.1 %."""
    counts = [draws.count(choice) for choice in choices]
    assert sum(counts) == len(draws)
    expected = len(draws) / len(choices)
    statistic = sum((count - expected) ** 2 / expected for count in counts)
    assert statistic < CHI_SQUARED[len(choices) - 1]


# --- windows that stay -------------------------------------------------------------------------


def test_all_steps_and_fixed_windows_never_move():
    for iteration in (0, 1, 1000):
        assert AllSteps(16)(iteration, seeded()) == range(16)
        assert FixedWindow(3, 4, 16)(iteration, seeded()) == range(3, 7)
    assert FixedWindow(0, 16, 16)(0, seeded()) == range(16)
    assert FixedWindow(12, 4, 16)(0, seeded()) == range(12, 16)


def test_what_does_not_draw_leaves_the_generator_alone():
    generator = seeded()
    before = generator.get_state()
    for schedule in (AllSteps(16), FixedWindow(3, 4, 16), SlidingWindow(4, 16)):
        schedule(7, generator)
    assert torch.equal(generator.get_state(), before)


# --- windows that slide ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # Two iterations a start, the last start is N - size = 3, then from the front.
        (SlidingWindow(2, 5, every=2), [0, 0, 1, 1, 2, 2, 3, 3, 0, 0, 1]),
        # Strides that do not divide N - size: the last start is clamped to it.
        (SlidingWindow(2, 5, every=1, stride=2), [0, 2, 3, 0, 2, 3]),
        (SlidingWindow(2, 9, every=1, stride=3), [0, 3, 6, 7, 0]),
        (SlidingWindow(2, 8, every=1, stride=3), [0, 3, 6, 0]),
        (SlidingWindow(2, 8, every=1, stride=100), [0, 6, 0]),
        (SlidingWindow(5, 5, every=3), [0] * 7),
        # ceil(4 * (1 - l/5)): 4, ceil(3.2), ceil(2.4), ceil(1.6).
        (
            SlidingWindow(2, 5, every=4, decay="linear"),
            [0] * 4 + [1] * 4 + [2] * 3 + [3] * 2 + [0] * 4 + [1],
        ),
        # 7 * (1 - 6/7) is exactly 1, whatever floating point makes of it.
        (
            SlidingWindow(1, 7, every=7, decay="linear"),
            [0] * 7 + [1] * 6 + [2] * 5 + [3] * 4 + [4] * 3 + [5] * 2 + [6] + [0],
        ),
        # ceil(6 * exp(-0.5 * relu(l - 1))): 6, 6, ceil(3.64), ceil(2.21), ceil(1.34).
        (
            SlidingWindow(1, 5, every=6, decay="exponential", rate=0.5, after=1),
            [0] * 6 + [1] * 6 + [2] * 4 + [3] * 3 + [4] * 2 + [0],
        ),
    ],
    ids=str,
)
def test_sliding_windows_by_hand(schedule, expected):
    assert starts_of(schedule, len(expected)) == expected


def test_the_published_progressive_window():
    """25 steps, a window of 4 that moves by 1 every 25 iterations, N = 24 trained steps."""
    found = starts_of(SlidingWindow(4, 24), 21 * 25 + 1)
    assert found == [start for start in range(21) for _ in range(25)] + [0]


def test_the_published_exponential_decay():
    """tau 25, k 0.1, l0 13: 25 iterations up to start 13, then 23, 21, 19, 17, 16, 14, 13."""
    schedule = SlidingWindow(4, 24, decay="exponential")
    stays = [25] * 14 + [23, 21, 19, 17, 16, 14, 13]
    assert [schedule.stays(start) for start in schedule.starts()] == stays
    for start in schedule.starts():
        formula = math.ceil(25 * math.exp(-0.1 * max(start - 13, 0)))
        assert schedule.stays(start) == formula
    found = starts_of(schedule, sum(stays) + 25)
    assert [found.count(start) for start in range(21)] == [50, *stays[1:]]
    assert found == sorted(found[:-25]) + [0] * 25


def test_the_decay_may_begin_one_start_before_the_last():
    """Start 13 is the last of 16 - 3: 25 iterations up to 12, then ceil(25 exp(-0.1)) = 23."""
    schedule = SlidingWindow(3, 16, decay="exponential", after=12)
    assert [schedule.stays(start) for start in schedule.starts()] == [25] * 13 + [23]


@pytest.mark.parametrize(
    ("schedule", "iterations"),
    [
        (FixedWindow(3, 4, 16), 1),
        # 4, ceil(4 * 6/9), ceil(4 * 3/9) and ceil(4 * 2/9) iterations at 0, 3, 6 and 7.
        (SlidingWindow(2, 9, every=4, stride=3, decay="linear"), 4 + 3 + 2 + 1),
        (SlidingWindow(1, 5, every=6, decay="exponential", rate=0.5, after=1), 21),
    ],
    ids=str,
)
def test_places_are_where_windows_begin(schedule, iterations):
    found = starts_of(schedule, iterations)
    shares = {start: found.count(start) / iterations for start in found}
    assert schedule.places() == pytest.approx(shares)


def test_places_of_a_drawn_window_are_its_range():
    assert RandomWindow(2, 9, 1, 6).places() == dict.fromkeys((1, 2, 3, 4), 0.25)
    assert RandomWindow(3, 9).places() == pytest.approx(dict.fromkeys(range(7), 1 / 7))


@pytest.mark.parametrize("every", [1, 7, 9, 25, 49])
def test_the_linear_decay_is_exact(every):
    """ceil(tau (1 - l/N)) in rational arithmetic; floating point misses some by one."""
    for num_trained in range(1, 31):
        schedule = SlidingWindow(1, num_trained, every, decay="linear")
        for start in range(num_trained):
            exact = every * (1 - Fraction(start, num_trained))
            assert schedule.stays(start) == math.ceil(exact) >= 1


# --- windows that are drawn --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "choices"),
    [
        (RandomWindow(4, 12), range(9)),
        (RandomWindow(3, 16, 0, 8), range(6)),
        (RandomWindow(2, 16, 5, 10), range(5, 9)),
    ],
)
def test_random_windows_are_uniform_over_their_range(schedule, choices):
    draws = starts_of(schedule, 9000)
    assert set(draws) == set(choices)
    assert_uniform(draws, choices)
    # Neighbouring draws do not repeat more often than chance: 1/n, five standard errors.
    share = 1 / len(choices)
    repeats = sum(a == b for a, b in pairwise(draws)) / (len(draws) - 1)
    assert abs(repeats - share) < 5 * math.sqrt(share * (1 - share) / len(draws))


def test_random_windows_follow_the_generator():
    schedule = RandomWindow(4, 12)
    assert starts_of(schedule, 50, seed=1) == starts_of(schedule, 50, seed=1)
    assert starts_of(schedule, 50, seed=1) != starts_of(schedule, 50, seed=2)
    assert starts_of(RandomWindow(12, 12), 5) == [0] * 5
    assert starts_of(RandomWindow(2, 12, 7, 9), 5) == [7] * 5


def test_chunk_windows_are_the_chunks_of_the_plan():
    plan = paper_plan(16)
    chunks = [range(0, 2), range(2, 5), range(5, 9), range(9, 16)]
    generator = seeded()
    draws = [chunks.index(ChunkWindow(plan)(i, generator)) for i in range(4000)]
    assert_uniform(draws, range(4))
    draws = [chunks.index(ChunkWindow(plan, (3, 1))(i, generator)) for i in range(400)]
    assert set(draws) == {1, 3} and abs(draws.count(1) - 200) < 5 * 10
    assert ChunkWindow(plan, (2,))(0, generator) == range(5, 9)
    first, again = ([ChunkWindow(plan)(i, g) for i in range(20)] for g in (seeded(3), seeded(3)))
    assert first == again


# --- plans inside a window ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "sizes"),
    [
        (range(16), (2, 3, 4, 7)),
        (range(0, 2), (2,)),
        (range(2, 9), (3, 4)),
        (range(5, 16), (4, 7)),
        (range(9, 16), (7,)),
    ],
)
def test_a_window_keeps_its_whole_chunks(window, sizes):
    assert restrict_plan(paper_plan(16), window).sizes == sizes


@pytest.mark.parametrize(
    ("window", "edge"), [(range(1, 5), 1), (range(0, 3), 3), (range(2, 17), 17), (range(4, 8), 4)]
)
def test_a_chunk_across_an_edge_is_refused(window, edge):
    message = (
        rf"chunk of \[2, 3, 4, 7\] lies across the edge of the window of steps {window.start} to "
        rf"{window.stop - 1};.*end a chunk at step {edge}$"
    )
    with pytest.raises(ValueError, match=message):
        restrict_plan(paper_plan(16), window)


# --- errors ------------------------------------------------------------------------------------

FITS = r"does not lie in the 16 trained steps; start must be in \[0, {}\]; shrink or move it"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FixedWindow(13, 4, 16), "a window of 4 steps from step 13 " + FITS.format(12)),
        (lambda: FixedWindow(-1, 4, 16), "a window of 4 steps from step -1 " + FITS.format(12)),
        (lambda: FixedWindow(0, 0, 16), "a window of 0 steps from step 0 " + FITS.format(16)),
        (lambda: FixedWindow(0, 17, 16), "a window of 17 steps from step 0 " + FITS.format(0)),
        (lambda: SlidingWindow(17, 16), "a window of 17 steps from step 0 " + FITS.format(0)),
        (lambda: RandomWindow(4, 16, 13), "a window of 4 steps from step 13 " + FITS.format(12)),
        (
            lambda: RandomWindow(4, 16, 0, 20),
            r"steps 0 to 19 of 16 trained steps; high must be in \[4, 16\]; change it or shrink",
        ),
        (
            lambda: RandomWindow(4, 16, 2, 5),
            r"window of 4 steps is to lie in steps 2 to 4 of 16 trained steps; high must be in "
            r"\[6, 16\]",
        ),
        (
            lambda: SlidingWindow(4, 16, every=0),
            "stays 0 iterations and moves by 1; both must be at least 1",
        ),
        (
            lambda: SlidingWindow(4, 16, stride=0),
            "stays 25 iterations and moves by 0; both must be at least 1",
        ),
        (
            lambda: SlidingWindow(4, 16, decay="cosine"),
            "decay is 'cosine'; known: constant, linear, exponential",
        ),
        (
            lambda: SlidingWindow(4, 24, decay="exponential", rate=0.0),
            r"rate of the exponential decay is 0\.0; it must be above 0, .*0\.1 is the published",
        ),
        # The last start is 13, and the stay at 13 is a whole one: nothing would ever shorten.
        (
            lambda: SlidingWindow(3, 16, decay="exponential"),
            "at starts after step 13, and a window of 3 in 16 trained steps starts at 13 at the "
            "latest, so nothing would decay; set after below 13",
        ),
        (
            lambda: ChunkWindow(ChunkPlan((2, 2)), (0, 2)),
            r"branching at chunk 2, but the plan \[2, 2\] has chunks 0 to 1",
        ),
        (lambda: ChunkWindow(ChunkPlan((2, 2)), (-1,)), "branching at chunk -1"),
    ],
)
def test_errors_name_value_rule_and_fix(make, message):
    with pytest.raises(ValueError, match=message):
        make()
