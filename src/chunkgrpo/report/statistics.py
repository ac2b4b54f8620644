# SPDX-License-Identifier: Apache-2.0
"""Intervals of a measured accuracy, or of the difference of two."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Estimate", "wilson_interval", "paired_difference", "bootstrap_interval"]


@dataclass(frozen=True)
class Estimate:
    """A number with its interval.

    Attributes:
        estimate: The point estimate.
        low: Lower end of the interval.
        high: Upper end.
        n: Observations it rests on.
    """

    estimate: float
    low: float
    high: float
    n: int

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside the interval."""
        return self.low > 0 or self.high < 0


def wilson_interval(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    r"""Wilson's score interval of a proportion.

    .. math:: \frac{\hat p + z^2/2n \pm z\sqrt{\hat p(1-\hat p)/n + z^2/4n^2}}{1 + z^2/n}

    Unlike the textbook interval it keeps its level for small n and for proportions near 0 or 1.
    The trials must be independent: several seeds of one prompt are not.

    Args:
        successes: 0..n.
        n: Trials, at least 1.
        level: Confidence level, inside (0, 1).

    Returns:
        Lower and upper end, each in [0, 1].

    Raises:
        ValueError: A count or the level is out of range.

    Reference: Wilson, Journal of the American Statistical Association 22 (1927), 209-212.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(
            f"{successes} successes of {n} trials: need n >= 1 and 0 <= successes <= n"
        )
    z = _normal_quantile(level)
    share = successes / n
    centre = share + z**2 / (2 * n)
    half = z * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    scale = 1 + z**2 / n
    # At 0 and n the ends are 0 and 1 exactly; the formula gives that up to rounding.
    low = 0.0 if successes == 0 else max(0.0, float((centre - half) / scale))
    high = 1.0 if successes == n else min(1.0, float((centre + half) / scale))
    return low, high


def mean_interval(values: NDArray) -> tuple[float, float]:
    """Normal 95 % interval of a mean: mean -+ 1.96 standard deviations / sqrt(n).

    Args:
        values: [n], n >= 2.

    Returns:
        Low and high end.
    """
    half = 1.96 * float(values.std()) / values.size**0.5
    return float(values.mean()) - half, float(values.mean()) + half


def paired_difference(
    base_correct: ArrayLike,
    tuned_correct: ArrayLike,
    level: float = 0.95,
    clusters: Sequence[Hashable] | NDArray | None = None,
) -> Estimate:
    r"""Mean difference, tuned minus base, over the same prompts and seeds.

    .. math::
        \bar d = \frac1n \sum_i d_i, \qquad
        s^2 = \frac{1}{n^2}\,\frac{M}{M-1} \sum_{m=1}^{M} \Big(\sum_{i \in m} (d_i-\bar d)\Big)^2,
        \qquad \bar d \pm t_{M-1}\, s

    Clusters m are the prompts: seeds of one prompt rise and fall together, and counting them as
    independent makes the interval too short. Without clusters each pair is its own, and this is
    the paired t interval. Where all scores are in [0, 1], the ends are cut at -1 and 1. Where all
    pairs differ by the same amount (for example none differs), the interval has no width; that says
    little when n is small.

    Args:
        base_correct: [n], finite: per image, correct or not, or a score of any unit.
        tuned_correct: [n], the same images in the same order after training.
        level: Confidence level, inside (0, 1).
        clusters: [n] labels, equal for images of one prompt.

    Returns:
        The difference with its interval; n counts pairs.

    Raises:
        ValueError: Lengths differ, a value is not finite, or there are fewer than two clusters.

    Reference: Liang and Zeger, Biometrika 73 (1986), 13-22 (cluster-robust variance); Miller,
    arXiv:2411.00640 (its use for evaluations of models).
    """
    from scipy.stats import t as student

    _check_level(level)
    base = np.asarray(base_correct, dtype=np.float64)
    tuned = np.asarray(tuned_correct, dtype=np.float64)
    if base.ndim != 1 or base.shape != tuned.shape:
        raise ValueError(f"need two equally long lists; shapes are {base.shape} and {tuned.shape}")
    values = np.concatenate([base, tuned])
    if not np.isfinite(values).all():
        raise ValueError("scores must be finite; leave images without a score out of both lists")
    difference = tuned - base
    labels = _labels(clusters, len(difference))
    num_clusters = int(labels.max(initial=-1)) + 1
    if num_clusters < 2:
        raise ValueError(f"an interval needs at least 2 clusters, found {num_clusters}")
    mean = float(difference.mean())
    sums = np.bincount(labels, weights=difference - mean, minlength=num_clusters)
    variance = num_clusters / (num_clusters - 1) * np.sum(sums**2) / len(difference) ** 2
    half = float(student.ppf(0.5 + level / 2, num_clusters - 1) * np.sqrt(variance))
    bound = 1.0 if np.all((values >= 0) & (values <= 1)) else np.inf
    return Estimate(mean, max(-bound, mean - half), min(bound, mean + half), len(difference))


def bootstrap_interval(
    values: ArrayLike,
    statistic: Callable[[NDArray], float] = np.mean,
    level: float = 0.95,
    clusters: Sequence[Hashable] | NDArray | None = None,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Percentile bootstrap interval of any statistic, whole clusters drawn with replacement.

    It assumes no distribution, but falls short of its level below some twenty clusters.

    Args:
        values: [n, ...], one row per observation.
        statistic: Rows to a number.
        level: Confidence level, inside (0, 1).
        clusters: [n] labels; rows of one label are drawn together. None: each row alone.
        num_resamples: Bootstrap samples, at least 1.
        seed: Seed of the draws; the same seed gives the same interval.

    Returns:
        The statistic of the values with its interval; n counts rows.

    Raises:
        ValueError: There is no row, or an argument is out of range.

    Reference: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    _check_level(level)
    rows = np.asarray(values, dtype=np.float64)
    if rows.ndim == 0 or len(rows) == 0:
        raise ValueError("need at least one observation")
    if num_resamples < 1:
        raise ValueError(f"num_resamples is {num_resamples}; it must be at least 1")
    labels = _labels(clusters, len(rows))
    order = np.argsort(labels, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(labels))[:-1])
    generator = np.random.default_rng(seed)
    draws = np.empty(num_resamples)
    for index in range(num_resamples):
        chosen = generator.integers(len(members), size=len(members))
        if clusters is not None:
            chosen = np.concatenate([members[m] for m in chosen])
        draws[index] = statistic(rows[chosen])
    low, high = np.quantile(draws, [0.5 - level / 2, 0.5 + level / 2])
    return Estimate(float(statistic(rows)), float(low), float(high), len(rows))


def _labels(clusters: Sequence[Hashable] | NDArray | None, n: int) -> NDArray[np.intp]:
    """Cluster labels as 0..M-1, in order of first appearance."""
    if clusters is None:
        return np.arange(n)
    if len(clusters) != n:
        raise ValueError(f"{len(clusters)} cluster labels for {n} observations")
    numbers: dict[Hashable, int] = {}
    items = clusters.tolist() if isinstance(clusters, np.ndarray) else clusters
    return np.array([numbers.setdefault(item, len(numbers)) for item in items], dtype=np.intp)


def _normal_quantile(level: float) -> float:
    from scipy.special import ndtri

    _check_level(level)
    return float(ndtri(0.5 + level / 2))


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; it must be inside (0, 1), for example 0.95")
