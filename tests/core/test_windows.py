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
from hypothesis import given
from hypothesis import strategies as st

from chunkgrpo.core.plans import ChunkPlan, paper_plan
from chunkgrpo.core.windows import AllSteps, ChunkWindow, FixedWindow, RandomWindow, SlidingWindow
from closed_forms import seeded

# Upper 0.1 % points of chi-squared, by degrees of freedom.
CHI_SQUARED = {3: 16.27, 5: 20.52, 8: 26.12}


def starts_of(schedule, num_trained, iterations, seed=0):
    """Starts of consecutive iterations; every window must have the schedule's size."""
    generator = seeded(seed)
    windows = [schedule(iteration, num_trained, generator) for iteration in range(iterations)]
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
    plan = paper_plan(16)
    for iteration in (0, 1, 1000):
        assert AllSteps().choose(iteration, plan, 16, seeded()) == (range(16), plan)
        assert FixedWindow(4, 3)(iteration, 16, seeded()) == range(3, 7)
    assert FixedWindow(16)(0, 16, seeded()) == range(16)
    assert FixedWindow(4, 12)(0, 16, seeded()) == range(12, 16)
    assert FixedWindow(4, 12).num_planned(16) == 4 and AllSteps().num_planned(16) == 16


def test_what_does_not_draw_leaves_the_generator_alone():
    generator = seeded()
    before = generator.get_state()
    for schedule in (AllSteps(), FixedWindow(4, 3), SlidingWindow(4)):
        schedule.choose(7, ChunkPlan((4,)), 16, generator)
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("window", [FixedWindow(4, 3), RandomWindow(4), SlidingWindow(4)], ids=str)
def test_the_plan_of_a_sized_window_covers_the_window(window):
    plan = ChunkPlan((1, 3))
    chosen, within = window.choose(3, plan, 16, seeded(2))
    assert chosen == window(3, 16, seeded(2)) and within is plan


# --- windows that slide ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "num_trained", "expected"),
    [
        # Two iterations a start, the last start is N - size = 3, then from the front.
        (SlidingWindow(2, every=2), 5, [0, 0, 1, 1, 2, 2, 3, 3, 0, 0, 1]),
        # Strides that do not divide N - size: the last start is clamped to it.
        (SlidingWindow(2, every=1, stride=2), 5, [0, 2, 3, 0, 2, 3]),
        (SlidingWindow(2, every=1, stride=3), 9, [0, 3, 6, 7, 0]),
        (SlidingWindow(2, every=1, stride=3), 8, [0, 3, 6, 0]),
        (SlidingWindow(2, every=1, stride=100), 8, [0, 6, 0]),
        (SlidingWindow(5, every=3), 5, [0] * 7),
        # ceil(4 * (1 - l/5)): 4, ceil(3.2), ceil(2.4), ceil(1.6).
        (
            SlidingWindow(2, every=4, decay="linear"),
            5,
            [0] * 4 + [1] * 4 + [2] * 3 + [3] * 2 + [0] * 4 + [1],
        ),
        # 7 * (1 - 6/7) is exactly 1, whatever floating point makes of it.
        (
            SlidingWindow(1, every=7, decay="linear"),
            7,
            [0] * 7 + [1] * 6 + [2] * 5 + [3] * 4 + [4] * 3 + [5] * 2 + [6] + [0],
        ),
        # ceil(6 * exp(-0.5 * relu(l - 1))): 6, 6, ceil(3.64), ceil(2.21), ceil(1.34).
        (
            SlidingWindow(1, every=6, decay="exponential", rate=0.5, after=1),
            5,
            [0] * 6 + [1] * 6 + [2] * 4 + [3] * 3 + [4] * 2 + [0],
        ),
    ],
    ids=str,
)
def test_sliding_windows_by_hand(schedule, num_trained, expected):
    assert starts_of(schedule, num_trained, len(expected)) == expected


def test_the_published_progressive_window():
    """25 steps, a window of 4 that moves by 1 every 25 iterations, N = 24 trained steps."""
    found = starts_of(SlidingWindow(4), 24, 21 * 25 + 1)
    assert found == [start for start in range(21) for _ in range(25)] + [0]


def test_the_published_exponential_decay():
    """tau 25, k 0.1, l0 13: 25 iterations up to start 13, then 23, 21, 19, 17, 16, 14, 13."""
    schedule = SlidingWindow(4, decay="exponential")
    stays = [25] * 14 + [23, 21, 19, 17, 16, 14, 13]
    assert [schedule.stays(start, 24) for start in schedule.starts(24)] == stays
    for start in schedule.starts(24):
        formula = math.ceil(25 * math.exp(-0.1 * max(start - 13, 0)))
        assert schedule.stays(start, 24) == formula
    found = starts_of(schedule, 24, sum(stays) + 25)
    assert [found.count(start) for start in range(21)] == [50, *stays[1:]]
    assert found == sorted(found[:-25]) + [0] * 25


def test_the_decay_may_begin_one_start_before_the_last():
    """Start 13 is the last of 16 - 3: 25 iterations up to 12, then ceil(25 exp(-0.1)) = 23."""
    schedule = SlidingWindow(3, decay="exponential", after=12)
    assert [schedule.stays(start, 16) for start in schedule.starts(16)] == [25] * 13 + [23]


@pytest.mark.parametrize(
    ("schedule", "num_trained", "iterations"),
    [
        (FixedWindow(4, 3), 16, 1),
        # 4, ceil(4 * 6/9), ceil(4 * 3/9) and ceil(4 * 2/9) iterations at 0, 3, 6 and 7.
        (SlidingWindow(2, every=4, stride=3, decay="linear"), 9, 4 + 3 + 2 + 1),
        (SlidingWindow(1, every=6, decay="exponential", rate=0.5, after=1), 5, 21),
    ],
    ids=str,
)
def test_places_are_where_windows_begin(schedule, num_trained, iterations):
    found = starts_of(schedule, num_trained, iterations)
    shares = {FixedWindow(schedule.size, start): found.count(start) / iterations for start in found}
    places = schedule.places(ChunkPlan((schedule.size,)), num_trained)
    assert places == pytest.approx(shares) and sum(places.values()) == pytest.approx(1)
    for place in places:
        assert place.places(ChunkPlan((schedule.size,)), num_trained) == {place: 1.0}


def test_places_of_a_drawn_window_are_its_range():
    found = RandomWindow(2, 1, 6).places(ChunkPlan((2,)), 9)
    assert found == {FixedWindow(2, start): 0.25 for start in (1, 2, 3, 4)}
    found = RandomWindow(3).places(ChunkPlan((3,)), 9)
    assert found == pytest.approx({FixedWindow(3, start): 1 / 7 for start in range(7)})


def test_places_of_all_steps_and_of_chunks():
    plan = paper_plan(16)
    assert AllSteps().places(plan, 16) == {AllSteps(): 1.0}
    every = ChunkWindow()
    assert every.places(plan, 16) == {ChunkWindow((j,)): 0.25 for j in range(4)}
    some = ChunkWindow((3, 1)).places(plan, 16)
    assert some == {ChunkWindow((3,)): 0.5, ChunkWindow((1,)): 0.5}
    for place in every.places(plan, 16):
        assert place.places(plan, 16) == {place: 1.0}
        assert place.choose(0, plan, 16, seeded(1)) == place.choose(1, plan, 16, seeded(2))


@given(
    num_trained=st.integers(1, 30), size=st.integers(1, 30), every=st.integers(1, 9),
    stride=st.integers(1, 5), decay=st.sampled_from(["constant", "linear"]),
)  # fmt: skip
def test_shares_of_places_sum_to_1_and_places_fit(num_trained, size, every, stride, decay):
    if size > num_trained:
        return
    plan = ChunkPlan((size,))
    for window in (RandomWindow(size), SlidingWindow(size, every, stride, decay)):
        assert window.num_planned(num_trained) == size
        places = window.places(plan, num_trained)
        assert sum(places.values()) == pytest.approx(1) and min(places.values()) > 0
        for place in places:
            chosen, within = place.choose(0, plan, num_trained, seeded())
            assert chosen.start >= 0 and chosen.stop <= num_trained and within == plan


@pytest.mark.parametrize("every", [1, 7, 9, 25, 49])
def test_the_linear_decay_is_exact(every):
    """ceil(tau (1 - l/N)) in rational arithmetic; floating point misses some by one."""
    for num_trained in range(1, 31):
        schedule = SlidingWindow(1, every, decay="linear")
        for start in range(num_trained):
            exact = every * (1 - Fraction(start, num_trained))
            assert schedule.stays(start, num_trained) == math.ceil(exact) >= 1


# --- windows that are drawn --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "num_trained", "choices"),
    [
        (RandomWindow(4), 12, range(9)),
        (RandomWindow(3, 0, 8), 16, range(6)),
        (RandomWindow(2, 5, 10), 16, range(5, 9)),
    ],
)
def test_random_windows_are_uniform_over_their_range(schedule, num_trained, choices):
    draws = starts_of(schedule, num_trained, 9000)
    assert set(draws) == set(choices)
    assert_uniform(draws, choices)
    # Neighbouring draws do not repeat more often than chance: 1/n, five standard errors.
    share = 1 / len(choices)
    repeats = sum(a == b for a, b in pairwise(draws)) / (len(draws) - 1)
    assert abs(repeats - share) < 5 * math.sqrt(share * (1 - share) / len(draws))


def test_random_windows_follow_the_generator():
    schedule = RandomWindow(4)
    assert starts_of(schedule, 12, 50, seed=1) == starts_of(schedule, 12, 50, seed=1)
    assert starts_of(schedule, 12, 50, seed=1) != starts_of(schedule, 12, 50, seed=2)
    assert starts_of(RandomWindow(12), 12, 5) == [0] * 5
    assert starts_of(RandomWindow(2, 7, 9), 12, 5) == [7] * 5


def test_chunk_windows_are_the_chunks_of_the_plan():
    plan = paper_plan(16)
    chunks = [range(0, 2), range(2, 5), range(5, 9), range(9, 16)]
    generator = seeded()

    def draw(window, iteration, generator):
        chosen, within = window.choose(iteration, plan, 16, generator)
        assert within == ChunkPlan((len(chosen),))
        return chosen

    draws = [chunks.index(draw(ChunkWindow(), i, generator)) for i in range(4000)]
    assert_uniform(draws, range(4))
    draws = [chunks.index(draw(ChunkWindow((3, 1)), i, generator)) for i in range(400)]
    assert set(draws) == {1, 3} and abs(draws.count(1) - 200) < 5 * 10
    assert draw(ChunkWindow((2,)), 0, generator) == range(5, 9)
    first, again = ([draw(ChunkWindow(), i, g) for i in range(20)] for g in (seeded(3), seeded(3)))
    assert first == again
    assert ChunkWindow().num_planned(16) == 16


# --- errors ------------------------------------------------------------------------------------

FITS = r"does not lie in the 16 trained steps; start must be in \[0, {}\]; shrink or move it"
TWO_CHUNKS = ChunkPlan((2, 2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: FixedWindow(4, 13).num_planned(16),
            "a window of 4 steps from step 13 " + FITS.format(12),
        ),
        (lambda: FixedWindow(4, -1), "start is -1; steps are counted from 0"),
        (lambda: FixedWindow(0), "size is 0; a window has at least 1 step"),
        (
            lambda: FixedWindow(17).num_planned(16),
            "a window of 17 steps from step 0 " + FITS.format(0),
        ),
        (
            lambda: SlidingWindow(17).num_planned(16),
            "a window of 17 steps from step 0 " + FITS.format(0),
        ),
        (
            lambda: RandomWindow(4, 13).num_planned(16),
            "a window of 4 steps from step 13 " + FITS.format(12),
        ),
        (
            lambda: RandomWindow(4, -1)(0, 16, seeded()),
            "a window of 4 steps from step -1 " + FITS.format(12),
        ),
        (
            lambda: RandomWindow(4, 0, 20).num_planned(16),
            r"steps 0 to 19 of 16 trained steps; high must be in \[4, 16\]; change it or shrink",
        ),
        (
            lambda: RandomWindow(4, 2, 5).num_planned(16),
            r"window of 4 steps is to lie in steps 2 to 4 of 16 trained steps; high must be in "
            r"\[6, 16\]",
        ),
        (
            lambda: SlidingWindow(4, every=0),
            "stays 0 iterations and moves by 1; both must be at least 1",
        ),
        (
            lambda: SlidingWindow(4, stride=0),
            "stays 25 iterations and moves by 0; both must be at least 1",
        ),
        (
            lambda: SlidingWindow(4, decay="cosine"),
            "decay 'cosine'.*; known: constant, linear, exponential",
        ),
        (
            lambda: SlidingWindow(4, decay="exponential", rate=0.0),
            r"rate of the exponential decay is 0\.0; it must be above 0, .*0\.1 is the published",
        ),
        (
            lambda: SlidingWindow(4, decay="linear", rate=0.1, after=3),
            "rate = 0.1 and after = 3 belongs to decay 'exponential', and decay is 'linear'; set",
        ),
        # The last start is 13, and the stay at 13 is a whole one: nothing would ever shorten.
        (
            lambda: SlidingWindow(3, decay="exponential").num_planned(16),
            "at starts after step 13, and a window of 3 in 16 trained steps starts at 13 at the "
            "latest, so nothing would decay; set after below 13",
        ),
        (
            lambda: ChunkWindow((0, 2)).places(TWO_CHUNKS, 4),
            r"branching at chunk 2, but the plan \[2, 2\] has chunks 0 to 1",
        ),
        (
            lambda: ChunkWindow((-1,)).choose(0, TWO_CHUNKS, 4, seeded()),
            r"indices are \(-1,\); they must be",
        ),
        (
            lambda: ChunkWindow("merged").choose(0, TWO_CHUNKS, 4, seeded()),
            "indices 'merged' must be replaced by the merged steps before a window is drawn",
        ),
    ],
)
def test_errors_name_value_rule_and_fix(make, message):
    with pytest.raises(ValueError, match=message):
        make()
