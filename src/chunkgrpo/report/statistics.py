# SPDX-License-Identifier: Apache-2.0
"""Intervals of a measured accuracy, or of the difference of two."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from chunkgrpo.report.score_interval import score_interval

__all__ = ["Estimate", "wilson_interval", "mean_estimate", "paired_difference"]

FEW_CLUSTERS = 20
"""Below this many prompts no interval says that two models differ."""

FEW_CHANGES = 10
"""Nor where fewer prompts than this have changed."""

ENOUGH_DIFFERENT = 20
"""Prompts with a value of their own from which on Student's interval is trusted."""

TOO_FEW = "too few prompts to tell"


@dataclass(frozen=True)
class Estimate:
    """A number with its interval.

    Attributes:
        estimate: The point estimate.
        low: Lower end of the interval.
        high: Upper end. Infinite, as the lower one, where nothing bounds the number.
        n: Observations it rests on.
        too_few: Whether these are of too few prompts, or too few changed, to call the number
            different from zero, whatever the interval.
    """

    estimate: float
    low: float
    high: float
    n: int
    too_few: bool = False

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside the interval, and there are enough prompts to say so."""
        return not self.too_few and (self.low > 0 or self.high < 0)

    @staticmethod
    def of(
        estimate: float, low: float | None, high: float | None, n: int, too_few: bool
    ) -> Estimate:
        """Return an estimate of which :attr:`ends` were stored."""
        low, high = (-math.inf if low is None else low), (math.inf if high is None else high)
        return Estimate(estimate, low, high, n, too_few)

    @property
    def ends(self) -> tuple[float | None, float | None]:
        """Both ends as JSON can hold them: None where infinite."""
        low, high = (end if math.isfinite(end) else None for end in (self.low, self.high))
        return low, high


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


def mean_estimate(
    values: ArrayLike,
    level: float = 0.95,
    clusters: Sequence[Hashable] | NDArray | None = None,
    share: bool = False,
) -> Estimate:
    r"""Mean with its interval; see :func:`paired_difference`.

    Args:
        values: [n], finite: a score per image.
        level: Confidence level, inside (0, 1).
        clusters: [n] labels, equal for images of one prompt; None if each has a prompt of its own.
        share: Whether scores are in [0, 1]; otherwise nothing outside those observed is expected.

    Returns:
        The mean with its interval; n counts values.

    Raises:
        ValueError: There is no value, one is not finite, or the level is out of range.
    """
    _check_level(level)
    scores = np.asarray(values, dtype=np.float64).ravel()
    if not len(scores) or not np.isfinite(scores).all():
        raise ValueError(f"{len(scores)} scores; at least one is needed, and all must be finite")
    bounds = (0.0, 1.0) if share else (float(scores.min()), float(scores.max()))
    return _estimate(scores, bounds, level, clusters)


def paired_difference(
    base_correct: ArrayLike,
    tuned_correct: ArrayLike,
    level: float = 0.95,
    clusters: Sequence[Hashable] | NDArray | None = None,
) -> Estimate:
    r"""Mean difference, tuned minus base, over the same prompts and seeds.

    Clusters m = 1..M are the prompts: seeds of one prompt rise and fall together, and counting them
    as independent makes the interval too short. With :math:`x_m = \bar d + \frac{M n_m}{n}
    (\bar d_m - \bar d)`, the mean difference of each prompt where all have equally many images:

    - Yes or no verdicts have the score interval of the mean of x (:mod:`.score_interval`), with
      :math:`t_{M-1}` for the normal quantile and bounds -1 and 1. It never has width 0: with 100
      prompts of which none changed it reaches from -3.8 to 3.8 points.
    - Other scores have Student's interval, :math:`\bar d \pm t_{M-1} s / \sqrt M`, unless
      several prompts have the same difference and fewer than 20 another one: then they have the
      score interval too. Its bounds are -1 and 1 for scores within [0, 1], and else the range of
      all scores that were observed.

    With fewer than 20 prompts, or fewer than 10 that have changed (for other scores: whose
    difference is not the commonest one), the estimate is marked :attr:`Estimate.too_few`.

    Args:
        base_correct: [n], finite: per image, correct or not, or a score of any unit.
        tuned_correct: [n], the same images in the same order after training.
        level: Confidence level, inside (0, 1).
        clusters: [n] labels, equal for images of one prompt.

    Returns:
        The difference with its interval; n counts pairs.

    Raises:
        ValueError: Lengths differ, a value is not finite, or there are fewer than two clusters.

    Reference: Tango, Statistics in Medicine 17 (1998), 891-908; Liang and Zeger, Biometrika 73
    (1986), 13-22 (cluster-robust variance); Miller, arXiv:2411.00640 (its use for evaluations of
    models).
    """
    _check_level(level)
    base = np.asarray(base_correct, dtype=np.float64)
    tuned = np.asarray(tuned_correct, dtype=np.float64)
    if base.ndim != 1 or base.shape != tuned.shape:
        raise ValueError(f"need two equally long lists; shapes are {base.shape} and {tuned.shape}")
    values = np.concatenate([base, tuned])
    if not np.isfinite(values).all():
        raise ValueError("scores must be finite; leave images without a score out of both lists")
    num_clusters = int(_labels(clusters, len(base)).max(initial=-1)) + 1
    if num_clusters < 2:
        raise ValueError(f"an interval needs at least 2 clusters, found {num_clusters}")
    within = bool(np.all((values >= 0) & (values <= 1)))
    bound = 1.0 if within else float(values.max() - values.min())
    verdicts = bool(np.isin(values, (0.0, 1.0)).all())
    found = _estimate(tuned - base, (-bound, bound), level, clusters, verdicts, FEW_CHANGES)
    if within:
        low, high = max(-1.0, found.low), min(1.0, found.high)
        return Estimate(found.estimate, low, high, found.n, found.too_few)
    return found


def _estimate(
    values: NDArray,
    bounds: tuple[float, float],
    level: float,
    clusters: Sequence[Hashable] | NDArray | None,
    verdicts: bool | None = None,
    few_changes: int = 0,
) -> Estimate:
    """Mean of clustered values; the score interval where Student's would claim too much."""
    from scipy.stats import t as student

    labels = _labels(clusters, len(values))
    number, mean = int(labels.max()) + 1, float(values.mean())
    if number == 1:
        return Estimate(mean, -math.inf, math.inf, len(values), True)
    weight = number / len(values)
    sums = np.bincount(labels, weights=values - mean, minlength=number)
    means = mean + weight * sums
    # Equal up to rounding: the sums of a few equal scores may differ in the last bit.
    scale = 1e-9 * max(1.0, *(abs(bound) for bound in bounds))
    _, counts = np.unique(np.round(means / scale), return_counts=True)
    different = number - int(counts.max())
    if verdicts is None:
        verdicts = bool(np.isin(values, bounds).all())
    changed = int(np.count_nonzero(np.abs(means) > scale)) if verdicts else different
    too_few = number < FEW_CLUSTERS or changed < few_changes
    quantile = float(student.ppf(0.5 + level / 2, number - 1))
    if not verdicts and (different >= ENOUGH_DIFFERENT or counts.max() == 1):
        half = quantile * float(means.std(ddof=1)) / number**0.5
        return Estimate(mean, mean - half, mean + half, len(values), too_few)
    if bounds[0] == bounds[1]:
        return Estimate(mean, -math.inf, math.inf, len(values), True)
    # A prompt with more images than others weighs more, and can lie further out.
    reach = max(1.0, weight * float(np.bincount(labels).max()))
    wide = (mean + reach * (bounds[0] - mean), mean + reach * (bounds[1] - mean))
    low, high = score_interval(np.clip(np.round(means, 12), *wide), wide, quantile)
    return Estimate(mean, max(bounds[0], low), min(bounds[1], high), len(values), too_few)


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
