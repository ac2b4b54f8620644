# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from chunkgrpo.report.statistics import (
    Estimate,
    bootstrap_interval,
    paired_difference,
    wilson_interval,
)


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (3, 10), (10, 10), (45, 81), (999, 1000)])
@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_wilson_agrees_with_scipy(successes: int, n: int, level: float) -> None:
    theirs = stats.binomtest(successes, n).proportion_ci(level, method="wilson")
    assert wilson_interval(successes, n, level) == pytest.approx((theirs.low, theirs.high))


def test_wilson_solves_its_equation() -> None:
    z = stats.norm.ppf(0.975)
    for end in wilson_interval(7, 20):
        assert abs(7 / 20 - end) == pytest.approx(z * math.sqrt(end * (1 - end) / 20))


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_symmetric_and_holds_the_share(counts: tuple[int, int]) -> None:
    successes, n = counts
    low, high = wilson_interval(successes, n)
    assert 0 <= low <= successes / n <= high <= 1
    mirrored = wilson_interval(n - successes, n)
    assert mirrored == pytest.approx((1 - high, 1 - low))


def test_wilson_covers() -> None:
    """Exact coverage, summed over the binomial; Wilson's average is close to its level."""
    n = 60
    intervals = [wilson_interval(k, n) for k in range(n + 1)]
    shares = np.linspace(0.05, 0.95, 91)
    coverage = [
        sum(stats.binom.pmf(k, n, p) for k, (a, b) in enumerate(intervals) if a <= p <= b)
        for p in shares
    ]
    assert np.mean(coverage) == pytest.approx(0.95, abs=0.01)
    assert min(coverage) > 0.91


@pytest.mark.parametrize(("successes", "n"), [(-1, 5), (6, 5), (0, 0)])
def test_wilson_refuses_impossible_counts(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="successes"):
        wilson_interval(successes, n)


@pytest.mark.parametrize("level", [0.0, 1.0, 95])
def test_levels_are_shares(level: float) -> None:
    with pytest.raises(ValueError, match="level"):
        wilson_interval(1, 2, level)
    with pytest.raises(ValueError, match="level"):
        paired_difference([0, 1], [1, 1], level)
    with pytest.raises(ValueError, match="level"):
        bootstrap_interval([0, 1], level=level)


def test_pairs_alone_give_the_paired_t_interval() -> None:
    generator = np.random.default_rng(1)
    base = generator.random(40)
    tuned = np.clip(base + generator.normal(0.05, 0.1, 40), 0, 1)
    ours = paired_difference(base, tuned, 0.9)
    theirs = stats.ttest_rel(tuned, base).confidence_interval(0.9)
    assert ours.estimate == pytest.approx((tuned - base).mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))
    assert ours.n == 40


def test_equal_seeds_count_as_one() -> None:
    """Three copies of every pair carry no more than one: same interval as without copies."""
    base, tuned = np.array([0, 0, 1, 0, 1, 1, 0]), np.array([1, 0, 1, 1, 0, 1, 1])
    once = paired_difference(base, tuned)
    thrice = paired_difference(
        np.repeat(base, 3), np.repeat(tuned, 3), clusters=np.repeat(np.arange(7), 3)
    )
    assert (thrice.low, thrice.high) == pytest.approx((once.low, once.high))
    assert (once.n, thrice.n) == (7, 21)


def test_balanced_clusters_give_the_t_interval_of_their_means() -> None:
    generator = np.random.default_rng(2)
    base, tuned = generator.random((12, 4)), generator.random((12, 4))
    labels = [f"prompt {i}" for i in range(12) for _ in range(4)]
    ours = paired_difference(base.ravel(), tuned.ravel(), clusters=labels)
    means = (tuned - base).mean(axis=1)
    theirs = stats.ttest_1samp(means, 0).confidence_interval(0.95)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))


def test_order_and_names_of_clusters_do_not_matter() -> None:
    generator = np.random.default_rng(3)
    base, tuned, labels = generator.random(30), generator.random(30), generator.integers(9, size=30)
    order = generator.permutation(30)
    first = paired_difference(base, tuned, clusters=labels)
    second = paired_difference(
        base[order], tuned[order], clusters=[("p", int(i)) for i in labels[order]]
    )
    assert (first.low, first.high) == pytest.approx((second.low, second.high))


def test_paired_difference_covers_when_seeds_of_a_prompt_agree() -> None:
    """Simulated: training helps 60 % of prompts and harms the others, all seeds alike."""
    generator = np.random.default_rng(4)
    num_runs, num_prompts, num_seeds = 1500, 40, 5
    helped, harmed, before = 0.9, 0.2, 0.5
    truth = 0.6 * helped + 0.4 * harmed - before
    clusters = np.repeat(np.arange(num_prompts), num_seeds)
    hits = naive_hits = 0
    for _ in range(num_runs):
        chance = np.where(generator.random(num_prompts) < 0.6, helped, harmed)
        base = generator.random(clusters.size) < before
        tuned = generator.random(clusters.size) < chance[clusters]
        clustered = paired_difference(base, tuned, clusters=clusters)
        naive = paired_difference(base, tuned)
        hits += clustered.low <= truth <= clustered.high
        naive_hits += naive.low <= truth <= naive.high
    assert hits / num_runs == pytest.approx(0.95, abs=0.015)
    assert naive_hits / num_runs < 0.9  # counting seeds as independent falls short


def test_the_ends_stay_differences_of_shares() -> None:
    result = paired_difference([0, 0, 1], [1, 1, 0])
    assert result.low >= -1 and result.high == 1


def test_scores_of_any_unit_are_compared() -> None:
    base, tuned = [-30.0, -20.0, 5.0], [-10.0, 10.0, 15.0]  # +20, +30, +10: mean 20, deviation 10
    result = paired_difference(base, tuned)
    half = 4.302653 * 10 / 3**0.5  # Student's t with two degrees of freedom
    assert result.estimate == 20
    assert (result.low, result.high) == pytest.approx((20 - half, 20 + half))


def test_excluding_zero() -> None:
    assert Estimate(0.2, 0.1, 0.3, 9).excludes_zero
    assert Estimate(-0.2, -0.3, -0.1, 9).excludes_zero
    assert not Estimate(0.1, 0.0, 0.2, 9).excludes_zero


@pytest.mark.parametrize(
    ("base", "tuned", "clusters", "message"),
    [
        ([0, 1], [0], None, "equally long"),
        ([[0], [1]], [[0], [1]], None, "equally long"),
        ([0, math.nan], [0, 1], None, "finite"),
        ([0, 1], [math.inf, 1], None, "finite"),
        ([0], [1], None, "at least 2"),
        ([], [], None, "at least 2"),
        ([0, 1], [1, 1], ["a", "a"], "at least 2"),
        ([0, 1], [1, 1], ["a"], "1 cluster labels"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    base: list, tuned: list, clusters: list | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        paired_difference(base, tuned, clusters=clusters)


def test_bootstrap_is_reproducible_and_near_the_t_interval() -> None:
    values = np.random.default_rng(5).normal(size=200)
    first, second = bootstrap_interval(values, seed=6), bootstrap_interval(values, seed=6)
    assert first == second
    assert bootstrap_interval(values, seed=7) != first
    normal = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (first.low, first.high) == pytest.approx((normal.low, normal.high), abs=0.02)
    assert first.estimate == pytest.approx(values.mean())


def test_bootstrap_draws_whole_clusters() -> None:
    values = np.random.default_rng(8).normal(size=50)
    once = bootstrap_interval(values, seed=1)
    copies = bootstrap_interval(np.tile(values, 3), clusters=np.tile(np.arange(50), 3), seed=1)
    assert (copies.low, copies.high) == pytest.approx((once.low, once.high))


def test_bootstrap_takes_any_statistic_of_rows() -> None:
    generator = np.random.default_rng(9)
    x = generator.normal(size=300)
    rows = np.stack([x, 0.8 * x + 0.6 * generator.normal(size=300)], axis=1)
    result = bootstrap_interval(rows, lambda r: float(np.corrcoef(r.T)[0, 1]), num_resamples=400)
    assert result.low < 0.8 < result.high
    assert result.n == 300


def test_bootstrap_covers() -> None:
    generator = np.random.default_rng(10)
    hits = 0
    for run in range(300):
        result = bootstrap_interval(generator.exponential(size=60), seed=run, num_resamples=300)
        hits += result.low <= 1 <= result.high
    assert 0.88 <= hits / 300 <= 0.98


def test_bootstrap_refuses_nothing_and_no_resamples() -> None:
    with pytest.raises(ValueError, match="at least one observation"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match="num_resamples"):
        bootstrap_interval([1.0], num_resamples=0)
