"""Numbers over seeds as tables and as curves with bands: shared by claims and comparisons."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from postgrad.evaluation.statistics import mean_interval
from postgrad.reports.curves import Point, finite, is_function, over_seeds, thin
from postgrad.reports.figures import Series, Whisker, line_chart, number
from postgrad.reports.page import templates

Values = Mapping[str, Mapping[str, Sequence[float]]]

BAND_NOTE = (
    "Line: mean over seeds. Band: from the lowest to the highest seed. A curve of one measured "
    "value over another is drawn seed by seed."
)
INTERVAL_NOTE = "Mean over seeds ± half the width of its 95 % interval (Student's t)."


def whisker(name: str, values: Sequence[float], colour: int) -> Whisker:
    """The row of a dot-and-whisker chart for the values of some seeds."""
    interval = mean_interval(values)
    return Whisker(name, interval.mean, interval.low, interval.high, values, colour)


def interval_table(arms: Values, deciding: str = "") -> Markup:
    """Every number of every arm as mean ± half its 95 % interval.

    `arms[arm][name]` are the seeds' values; arms may have different names. The longer side, arms or
    names, becomes the rows. `deciding` names the number to set in bold.
    """
    names = list(dict.fromkeys(name for values in arms.values() for name in values))
    cells = {(arm, name): mean_cell(arms[arm].get(name)) for arm in arms for name in names}
    as_rows = len(names) > len(arms)

    def heads(of: Iterable[str]) -> list[dict[str, Any]]:
        return [{"name": name.replace("_", " "), "deciding": name == deciding} for name in of]

    rows = heads(names if as_rows else arms)
    for row, key in zip(rows, names if as_rows else arms, strict=True):
        row["cells"] = [
            {**cells[(other, key) if as_rows else (key, other)], "deciding": other == deciding}
            for other in (arms if as_rows else names)
        ]
    text = (
        templates()
        .get_template("table.html")
        .render(corner="", heads=heads(arms if as_rows else names), rows=rows)
    )
    return Markup(text)


def mean_cell(values: Sequence[float] | None) -> dict[str, str]:
    """A mean and half the width of its 95 % interval, as texts; a dash where there is nothing."""
    if not values:
        return {"mean": "–", "half": ""}
    interval = mean_interval(values)
    half = interval.high - interval.mean
    return {
        "mean": number(interval.mean),
        "half": number(half, 2) if math.isfinite(half) and half > 0 else "",
    }


def banded_chart(
    title: str,
    arms: Mapping[str, Sequence[Sequence[Sequence[float]]]],
    colours: Mapping[str, int],
    *,
    x_label: str,
) -> Markup:
    """One curve of several arms, `arms[arm]` holding its points under each seed.

    Where x increases, mean and band over seeds; otherwise (one measured value against another)
    every seed is a path of its own.
    """
    series: list[Series] = []
    remarks: list[str] = []
    for arm, seeds in arms.items():
        known: list[list[Point]] = []
        for points in seeds:
            drawable, remark = finite(points)
            known.append(drawable)
            remarks += [remark] if remark else []
        if all(map(is_function, known)):
            mean, band = over_seeds(known)
            series.append(Series(arm, mean, colours[arm], band=band if len(known) > 1 else ()))
        else:
            series += [Series(arm, thin(points), colours[arm]) for points in known]
    return line_chart(title, series, x_label=x_label, note=" ".join(remarks))
