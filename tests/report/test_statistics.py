# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, stats

from chunkgrpo.report.score_interval import score_interval
from chunkgrpo.report.statistics import (
    Estimate,
    mean_estimate,
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
        mean_estimate([0, 1], level=level)


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
    num_runs, num_prompts, num_seeds = 300, 40, 5
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
    assert hits / num_runs == pytest.approx(0.95, abs=0.03)
    assert naive_hits / num_runs < 0.9  # counting seeds as independent falls short


def test_the_ends_stay_differences_of_shares() -> None:
    result = paired_difference([0, 0, 1], [1, 1, 0])
    assert -1 <= result.low < result.high <= 1
    scores = paired_difference([0.1, 0.2, 0.9], [0.9, 0.95, 0.0])
    assert scores.low >= -1 and scores.high == 1


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


# --- where intervals looked certain -------------------------------------------------------------


def tango(better: int, worse: int, n: int, z: float) -> tuple[float, float]:
    """Tango's interval from its own closed form, the constrained estimate of one cell."""

    def statistic(difference: float) -> float:
        b = -better - worse + (2 * n - better + worse) * difference
        c = -worse * difference * (1 - difference)
        cell = (math.sqrt(b * b - 8 * n * c) - b) / (4 * n)
        variance = n * (2 * cell + difference * (1 - difference))
        return (better - worse - n * difference) / math.sqrt(variance)

    mean = (better - worse) / n
    low = optimize.brentq(lambda d: statistic(d) - z, -1 + 1e-9, mean + 1e-9)
    high = optimize.brentq(lambda d: statistic(d) + z, mean - 1e-9, 1 - 1e-9)
    return low, high


@pytest.mark.parametrize(
    ("better", "worse", "n"), [(12, 3, 50), (1, 0, 100), (5, 5, 40), (9, 0, 20), (0, 2, 30)]
)
def test_independent_verdicts_have_tangos_interval(better: int, worse: int, n: int) -> None:
    values = np.array([1.0] * better + [-1.0] * worse + [0.0] * (n - better - worse))
    found = score_interval(values, (-1.0, 1.0), 1.96)
    assert found == pytest.approx(tango(better, worse, n, 1.96), abs=1e-7)
    base = np.array([0] * better + [1] * worse + [0] * (n - better - worse))
    tuned = np.array([1] * better + [0] * worse + [0] * (n - better - worse))
    paired = paired_difference(base, tuned)
    quantile = stats.t.ppf(0.975, n - 1)
    assert (paired.low, paired.high) == pytest.approx(tango(better, worse, n, quantile), abs=1e-7)


@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_score_interval_of_verdicts_is_wilsons(counts: tuple[int, int]) -> None:
    successes, n = counts
    values = np.array([1.0] * successes + [0.0] * (n - successes))
    z = float(stats.norm.ppf(0.975))
    found = score_interval(values, (0.0, 1.0), z)
    assert found == pytest.approx(wilson_interval(successes, n), abs=1e-7)


def test_nothing_changed_is_no_certainty() -> None:
    """The rule of three, and a bit: none of 100 leaves up to q^2 / (n + q^2) of them possible."""
    verdicts = [0, 1] * 50
    found = paired_difference(verdicts, verdicts)
    squared = float(stats.t.ppf(0.975, 99)) ** 2
    assert found.estimate == 0 and found.high == pytest.approx(squared / (100 + squared))
    assert found.low == -found.high and found.too_few and not found.excludes_zero
    # All changed alike, in scores of any unit.
    scores = np.linspace(-5, 5, 50)
    shifted = paired_difference(scores, scores + 2)
    assert shifted.low < 2 < shifted.high and shifted.too_few
    assert paired_difference([3.0] * 50, [3.0] * 50).ends == (None, None)


def test_equal_up_to_rounding_is_equal() -> None:
    """The means of 0.1 + 0.2 and 0.3 differ in the last bit, which is no deviation."""
    base, tuned = [0.1, 0.2, 0.3] * 20, [0.4, 0.5, 0.6] * 20
    found = paired_difference(base, tuned)
    assert found.estimate == pytest.approx(0.3)
    assert found.high - found.low > 0.05 and found.too_few


@pytest.mark.parametrize("number", [19, 20])
def test_fewer_than_twenty_prompts_tell_nothing(number: int) -> None:
    found = paired_difference([0] * number, [1] * number)
    assert found.low > 0 and found.too_few is (number < 20)
    assert paired_difference(
        [0] * 19 * 4, [1] * 19 * 4, clusters=[i // 4 for i in range(76)]
    ).too_few


@pytest.mark.parametrize("changed", [9, 10])
def test_sparse_changes_tell_nothing(changed: int) -> None:
    base = np.zeros(200)
    tuned = base.copy()
    tuned[:changed] = 1
    found = paired_difference(base, tuned)
    assert found.low > 0 and found.excludes_zero is (changed >= 10)


def test_a_mean_of_equal_scores_has_a_width() -> None:
    assert mean_estimate([1.0] * 40, share=True).high == 1.0
    assert mean_estimate([1.0] * 40, share=True).low < 0.92
    assert mean_estimate([2.0] * 40).ends == (None, None)
    values = np.random.default_rng(0).normal(3, 2, 50)
    theirs = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    found = mean_estimate(values)
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high))
    tripled = mean_estimate(np.repeat(values, 3), clusters=np.repeat(np.arange(50), 3))
    assert (tripled.low, tripled.high) == pytest.approx((found.low, found.high))


@pytest.mark.parametrize("values", [[], [math.nan], [1.0, math.inf]])
def test_a_mean_needs_finite_scores(values: list) -> None:
    with pytest.raises(ValueError, match="at least one is needed, and all must be finite"):
        mean_estimate(values)


def test_an_estimate_can_be_stored_and_read() -> None:
    for estimate in (Estimate(0.1, -math.inf, math.inf, 3, True), Estimate(0.1, 0.0, 0.2, 30)):
        stored = (estimate.estimate, *estimate.ends, estimate.n, estimate.too_few)
        assert Estimate.of(*stored) == estimate


def test_prompts_with_more_images_weigh_more() -> None:
    """The residuals of a ratio: what the cluster-robust variance is made of, for any sizes."""
    generator = np.random.default_rng(7)
    labels = np.repeat(np.arange(30), generator.integers(1, 6, 30))
    base, tuned = generator.random((2, len(labels)))
    found = paired_difference(base, tuned, clusters=labels)
    d = tuned - base
    sums = np.bincount(labels, weights=d - d.mean())
    half = stats.t.ppf(0.975, 29) * math.sqrt(30 / 29 * (sums**2).sum()) / len(labels)
    assert (found.low, found.high) == pytest.approx((d.mean() - half, d.mean() + half))
