"""Metric rows as curves: points by name, thinned, smoothed, and gathered over seeds."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

# from this many points on a noisy curve is drawn smoothed
_SMOOTHED = 24
LEADING = ("reward", "loss")
Point = tuple[float, float]
Band = tuple[float, float, float]


def points_by_name(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Point]]:
    """The (step, value) points of every number in metric rows `{"step": n, name: value}`."""
    found: dict[str, list[Point]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step" and isinstance(value, (int, float)):
                found.setdefault(name, []).append((float(row["step"]), float(value)))
    return found


def prefix(name: str) -> str:
    """What a metric belongs to: `reward`, `loss`, the word before its first `/`, or nothing."""
    for word in LEADING:
        if name == word or name.startswith((f"{word}/", f"{word}_")):
            return word
    return name.split("/")[0] if "/" in name else ""


def by_importance(names: Iterable[str]) -> list[str]:
    """The names of metrics in the order of a report: evaluations, reward, loss, others, time."""
    order = {"evaluation": 0, "reward": 1, "loss": 2, "": 3, "throughput": 5, "time": 6}
    return sorted(names, key=lambda name: order.get(prefix(name), 4))


def spoken(name: str) -> str:
    """A metric's name for people."""
    return name.replace("_", " ").replace("/", " / ")


def finite(points: Sequence[Sequence[float]]) -> tuple[list[Point], str]:
    """The points that can be drawn, and a remark for the reader if some cannot."""
    known = [(p[0], p[1]) for p in points if math.isfinite(p[0]) and math.isfinite(p[1])]
    odd = len(points) - len(known)
    return known, f"Values that are not finite are left out: {odd}." if odd else ""


def thin(points: Sequence[Point], limit: int = 400) -> list[Point]:
    """At most about `limit` points that keep every bucket's lowest and highest value."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(len(points) / (limit // 2))
    kept: list[Point] = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        extremes = {min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])}
        kept += sorted(extremes)
    return kept


def is_noisy(points: Sequence[Point]) -> bool:
    """Whether the curve turns at more than a third of its points (pure noise: at two thirds)."""
    changes = [right[1] - left[1] for left, right in pairwise(points)]
    turns = sum(before * after < 0 for before, after in pairwise(changes))
    return turns > len(points) / 3


def smooth(points: Sequence[Point], half_life: float) -> list[Point]:
    """Values averaged with weights that halve every `half_life` points to both sides."""
    decay = 0.5 ** (1.0 / half_life)
    values = [y for _, y in points]
    before, after = _decayed(values, decay), _decayed(values[::-1], decay)[::-1]
    return [
        (x, (b[0] + a[0] - y) / (b[1] + a[1] - 1.0))
        for (x, y), b, a in zip(points, before, after, strict=True)
    ]


def readable(points: Sequence[Point]) -> tuple[list[Point], list[Point]]:
    """Finite points as a line to draw, and what to draw pale behind it: a noisy curve is smoothed.

    The second is empty where the line is of the values themselves.
    """
    if len(points) < _SMOOTHED or not is_noisy(points):
        return thin(points), []
    return thin(smooth(points, half_life=len(points) / 40), 300), thin(points)


def _decayed(values: Sequence[float], decay: float) -> list[tuple[float, float]]:
    """Running sums of the values and of their weights, both fading by `decay` a point."""
    total = weight = 0.0
    sums = []
    for value in values:
        total, weight = decay * total + value, decay * weight + 1.0
        sums.append((total, weight))
    return sums


def is_function(points: Sequence[Point]) -> bool:
    """Whether x strictly increases, so that the points have one value at each x."""
    return all(left[0] < right[0] for left, right in pairwise(points))


def interpolate(points: Sequence[Point], x: float) -> float:
    """The value at `x` on the straight line between its neighbours, which must exist."""
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= x <= x1:
            return y0 if x == x0 else y1 if x == x1 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    if len(points) == 1 and points[0][0] == x:
        return points[0][1]
    raise ValueError(f"{x} lies outside the curve")


def over_seeds(curves: Sequence[Sequence[Point]]) -> tuple[list[Point], list[Band]]:
    """Mean, and lowest to highest value, of one curve under several seeds.

    On the union of the seeds' x values, where all of them have a value (between points: on the
    straight line). Every curve must satisfy `is_function`; without a common range both are empty.
    """
    curves = [curve for curve in curves if curve]
    if not curves:
        return [], []
    first, last = max(curve[0][0] for curve in curves), min(curve[-1][0] for curve in curves)
    grid = sorted({x for curve in curves for x, _ in curve if first <= x <= last})
    step = math.ceil(len(grid) / 240) or 1
    grid = sorted({*grid[::step], *grid[-1:]})
    mean, band = [], []
    for x in grid:
        values = [interpolate(curve, x) for curve in curves]
        mean.append((x, math.fsum(values) / len(values)))
        band.append((x, min(values), max(values)))
    return mean, band
