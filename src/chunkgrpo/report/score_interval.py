# SPDX-License-Identifier: Apache-2.0
"""The score interval of a mean of bounded values, of whatever distribution."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np
from numpy.typing import NDArray


def score_interval(
    values: NDArray, bounds: tuple[float, float], quantile: float
) -> tuple[float, float]:
    r"""All means that the values do not contradict.

    .. math:: \Big\{\mu : \frac{M (\bar x - \mu)^2}{v(\mu)} \le q^2\Big\}

    with v(mu) the variance of the most likely distribution of mean mu on the values and the two
    bounds: one that was never observed may have the mass that the mean needs. So the interval has a
    width where all values are equal, and knows that rare large values may have been missed. For
    values 0 and 1 it is Wilson's interval of a proportion, for -1, 0 and 1 Tango's of the
    difference of two paired proportions.

    Args:
        values: [M], independent, within the bounds.
        bounds: What no value can leave, low and high.
        quantile: q, of the normal or of Student's distribution.

    Returns:
        Low and high end, within the bounds.

    Reference: Wilson, Journal of the American Statistical Association 22 (1927), 209-212; Tango,
    Statistics in Medicine 17 (1998), 891-908; Owen, Empirical Likelihood (2001), section 2.
    """
    low, high = bounds
    support, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    mean, number = float(np.mean(values)), float(counts.sum())

    def excess(mu: float) -> float:
        return number * (mean - mu) ** 2 - quantile**2 * null_variance(support, counts, mu, bounds)

    ends = [_crossing(excess, mean, end) for end in (low, high)]
    return max(low, ends[0]), min(high, ends[1])


def null_variance(
    support: NDArray, counts: NDArray, mean: float, bounds: tuple[float, float]
) -> float:
    r"""Variance of the most likely distribution of a given mean.

    It maximises :math:`\sum_j n_j \log p_j` over distributions on the support and the bounds:
    :math:`p_j = n_j / (M (1 + \lambda (x_j - \mu)))`, and where no such lambda leads to the mean,
    the bound on its side has the rest of the mass.

    Args:
        support: [J] distinct values within the bounds.
        counts: [J], how often each was observed.
        mean: Inside the bounds.
        bounds: Low and high.
    """
    from scipy.optimize import brentq

    deviation = support - mean
    number = counts.sum()
    # Within these limits every probability is positive, at the bounds too.
    limits = (-1 / (bounds[1] - mean), 1 / (mean - bounds[0]))

    def pull(tilt: float) -> float:
        return float(np.sum(counts * deviation / (1 + tilt * deviation)))

    inside = [limit * (1 - 1e-12) for limit in limits]
    for tilt, outside, rest in (
        (limits[0], pull(inside[0]) <= 0, bounds[1]),
        (limits[1], pull(inside[1]) >= 0, bounds[0]),
    ):
        if outside:
            chance = counts / (number * np.maximum(1 + tilt * deviation, 1e-300))
            left = max(0.0, 1.0 - float(chance.sum()))
            return float(np.sum(chance * deviation**2)) + left * (rest - mean) ** 2
    tilt = cast(float, brentq(pull, *inside, xtol=1e-14))
    return float(np.sum(counts * deviation**2 / (number * (1 + tilt * deviation))))


def _crossing(excess: Callable[[float], float], mean: float, end: float) -> float:
    """Return where the excess becomes positive on the way from the mean to a bound."""
    from scipy.optimize import brentq

    if mean == end:
        return end
    near, far = (mean + share * (end - mean) for share in (1e-9, 1 - 1e-9))
    if excess(far) <= 0:
        return end
    return mean if excess(near) >= 0 else cast(float, brentq(excess, near, far, xtol=1e-10))
