"""Curves and figures: thinning, smoothing, bands over seeds, ticks, numbers."""

import math
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from postgrad.reports.curves import (
    finite,
    interpolate,
    is_function,
    is_noisy,
    over_seeds,
    points_by_name,
    smooth,
    thin,
)
from postgrad.reports.figures import (
    Series,
    Whisker,
    line_chart,
    number,
    padded,
    sparkline,
    stacked_chart,
    ticks,
    whisker_chart,
)
from postgrad.reports.page import duration


def test_rows_become_points_by_name() -> None:
    rows = [{"step": 0, "a": 1.0}, {"step": 2, "a": 3, "b": 0.5, "c": "text"}]
    assert points_by_name(rows) == {"a": [(0.0, 1.0), (2.0, 3.0)], "b": [(2.0, 0.5)]}


def test_thinning_keeps_extremes_and_short_curves() -> None:
    points = [(float(i), math.sin(i)) for i in range(10_000)]
    points[4321] = (4321.0, 99.0)
    points[8765] = (8765.0, -99.0)
    kept = thin(points, 400)
    assert len(kept) <= 401
    assert is_function(kept)
    assert {(4321.0, 99.0), (8765.0, -99.0)} <= set(kept)
    assert thin(points[:400], 400) == points[:400]


def test_smoothing_keeps_constants_and_lags_nowhere() -> None:
    constant = [(float(i), 7.0) for i in range(50)]
    assert [y for _, y in smooth(constant, 3.0)] == pytest.approx([7.0] * 50)
    # symmetric weights reproduce a straight line away from its ends
    line = [(float(i), 2.0 * i) for i in range(201)]
    assert smooth(line, 3.0)[100] == (100.0, pytest.approx(200.0))
    # two points at half-life one: weights 1 and 1/2
    assert smooth([(0.0, 0.0), (1.0, 3.0)], 1.0) == [
        (0.0, pytest.approx(1.0)),
        (1.0, pytest.approx(2.0)),
    ]


def test_only_curves_that_turn_often_are_noisy() -> None:
    assert is_noisy([(float(i), float(i % 2)) for i in range(30)])
    assert not is_noisy([(float(i), math.cos(i / 10)) for i in range(30)])


def test_points_that_are_not_finite_are_counted() -> None:
    points, remark = finite([(0, 1.0), (1, math.nan), (2, math.inf)])
    assert points == [(0, 1.0)]
    assert remark == "Values that are not finite are left out: 2."
    assert finite([(0, 1.0)])[1] == ""


def test_seeds_are_gathered_where_all_have_values() -> None:
    mean, band = over_seeds([[(0, 0.0), (2, 2.0), (4, 4.0)], [(1, 3.0), (3, 3.0)]])
    assert mean == [(1, 2.0), (2, 2.5), (3, 3.0)]
    assert band == [(1, 1.0, 3.0), (2, 2.0, 3.0), (3, 3.0, 3.0)]
    assert over_seeds([[(0, 0.0)], [(1, 1.0)]]) == ([], [])
    assert over_seeds([[], []]) == ([], [])
    assert over_seeds([[(5, 1.0)], [(5, 3.0)]]) == ([(5, 2.0)], [(5, 1.0, 3.0)])
    with pytest.raises(ValueError, match="outside"):
        interpolate([(0, 0.0), (1, 1.0)], 2.0)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (12, "12"),
        (-1234567.0, "−1,234,567"),
        (0.30214, "0.3021"),
        (-0.5, "−0.5000"),
        (1234.56, "1,235"),
        (1e-6, "1.000e−6"),
        (2.5e12 + 0.5, "2.500e12"),
        (math.inf, "∞"),
        (-math.inf, "−∞"),
        (math.nan, "not a number"),
    ],
)
def test_numbers_for_people(value: float, text: str) -> None:
    assert number(value) == text


@given(st.floats(-1e12, 1e12), st.floats(1e-6, 1e12), st.floats(2.0, 6.0))
def test_ticks_are_few_round_and_inside(low: float, width: float, least: float) -> None:
    high = low + width
    assume(width > 1e-9 * max(abs(low), abs(high)))
    marks = ticks(low, high, least)
    slack = 1e-6 * width
    assert least - 1 <= len(marks) <= 2.5 * least + 1.01
    assert all(low - slack <= mark <= high + slack for mark in marks)
    steps = [right - left for left, right in pairwise(marks)]
    assert steps == pytest.approx([steps[0]] * len(steps), rel=1e-3)


def test_ticks_of_known_ranges() -> None:
    assert ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(0.3, 0.49) == [0.3, 0.35, 0.4, 0.45]
    with pytest.raises(ValueError, match="no range"):
        ticks(1.0, 1.0)


def test_ranges_start_at_zero_where_zero_is_near() -> None:
    assert padded([0.1, 1.0])[0] == 0.0
    assert padded([-1.0, -0.1])[1] == 0.0
    assert padded([0.9, 1.0])[0] == pytest.approx(0.894)
    low, high = padded([0.0, 0.0])
    assert low < 0.0 < high


def test_a_chart_escapes_names_and_says_when_it_is_empty() -> None:
    figure = line_chart("<b>", [Series("<i>", [(0, 0.0), (1, 1.0)]), Series("j", [(0, 0.0)])])
    assert "<b>" not in figure
    assert "<i>" not in figure
    assert "&lt;i&gt;" in figure
    assert "no finite values" in line_chart("t", [Series("s", [])])


def test_a_single_point_and_a_flat_curve_can_be_drawn() -> None:
    for points in ([(3.0, 0.2)], [(0.0, 5.0), (1.0, 5.0)], [(0.0, 0.0), (1.0, 0.0)]):
        assert "nan" not in line_chart("t", [Series("s", points)])


def test_stacked_layers_stand_on_each_other() -> None:
    figure = stacked_chart(
        "t", [Series("a", [(0, 1.0), (1, 1.0)]), Series("b", [(0, 2.0), (1, 2.0)], 1)]
    )
    a, b = [part.split('d="')[1].split('"')[0] for part in figure.split('class="layer')[1:]]
    # a's upper edge (its first two points) is b's lower edge (its last two, reversed)
    assert a[1:-1].split("L")[:2] == b[1:-1].split("L")[:1:-1]


def test_a_whisker_needs_a_finite_interval() -> None:
    rows = [Whisker("a", 1.0, 0.5, 1.5, (0.9, 1.1)), Whisker("b", 2.0, -math.inf, math.inf)]
    figure = whisker_chart("t", rows, label="x")
    assert figure.count('class="whisker"') == 1
    assert figure.count('class="mean"') == 2
    assert figure.count('class="ring"') == 2
    lost = whisker_chart("t", [Whisker("a", math.nan, math.nan, math.nan)], label="x")
    assert "no finite values" in lost


def test_a_sparkline_needs_two_points() -> None:
    assert sparkline([(0, 1.0), (1, math.nan)]) == ""
    assert "<svg" in sparkline([(0, 1.0), (1, 2.0)])


def test_durations() -> None:
    assert duration(9.96) == "10.0 s"
    assert duration(95.2) == "1 min 35 s"
    assert duration(3720) == "1 h 2 min"
