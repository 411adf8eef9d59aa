"""Statistics over seeds: means with Student intervals, paired comparisons, bootstrap intervals."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

# 97.5 % quantiles of Student's t for 1 … 30 degrees of freedom
_T = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip


@dataclass(frozen=True)
class Interval:
    """A mean and its two-sided 95 % confidence interval."""

    mean: float
    low: float
    high: float


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean and Student-t 95 % interval; with a single value the interval is unbounded."""
    if not values:
        raise ValueError("no values to average")
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, -math.inf, math.inf)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    half = (_T[n - 2] if n <= 31 else 1.96) * deviation / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def verdict(method: Sequence[float], baseline: Sequence[float], higher_is_better: bool) -> str:
    """`yes`, `no` or `not separable`, from the 95 % interval of the differences seed by seed."""
    if len(method) != len(baseline):
        raise ValueError(f"{len(method)} seeds of the method, {len(baseline)} of the baseline")
    sign = 1.0 if higher_is_better else -1.0
    gap = mean_interval([sign * (m - b) for m, b in zip(method, baseline, strict=True)])
    if gap.low > 0:
        return "yes"
    return "no" if gap.high < 0 else "not separable"


def separation(upper: Sequence[float], lower: Sequence[float]) -> float:
    """The probability that a value of `upper` is above one of `lower`; ties count half (AUC)."""
    if not upper or not lower:
        raise ValueError("no values to tell apart")
    ordered = sorted(lower)
    ahead = sum(bisect_left(ordered, value) + bisect_right(ordered, value) for value in upper)
    return ahead / (2 * len(upper) * len(lower))


def value_at(points: Sequence[tuple[float, float]], x: float) -> float:
    """Where a path of points (x, y) first reaches `x`: its y there, linear between two points.

    A path that never gets so far counts with its furthest point.
    """
    if not points:
        raise ValueError("a path needs at least one point")
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 < x1 and x0 <= x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return max(points, key=lambda point: point[0])[1]
