"""Figures as inline SVG: curves, stacked areas, dots with whiskers. Colours: assets/figures.css."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from postgrad.reports.curves import Band, Point, finite
from postgrad.visible import visible

COLOURS = 8
_LEFT, _RIGHT, _TOP, _BOTTOM = 48.0, 12.0, 10.0, 26.0


@dataclass(frozen=True)
class Series:
    """A line of a chart; `raw` is drawn pale behind it, `band` as (x, low, high) around it."""

    name: str
    points: Sequence[Point]
    colour: int = 0
    raw: Sequence[Point] = ()
    band: Sequence[Band] = ()


@dataclass(frozen=True)
class Whisker:
    """A row of a dot-and-whisker chart: mean, 95 % interval (infinite: none), seeds' values."""

    name: str
    mean: float
    low: float
    high: float
    values: Sequence[float] = ()
    colour: int = 0


def number(value: float, digits: int = 4) -> str:
    """A number for people: `digits` significant digits, thousands separated, a real minus sign."""
    if not math.isfinite(value):
        return {math.inf: "∞", -math.inf: "−∞"}.get(value, "not a number")
    if value == int(value) and abs(value) < 1e15:
        text = f"{int(value):,}"
    elif 1e-3 <= abs(value) < 1e6:
        decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        text = f"{value:,.{decimals}f}"
    else:
        text = f"{value:.{digits - 1}e}".replace("e+0", "e").replace("e-0", "e-").replace("e+", "e")
    return text.replace("-", "−")


def ticks(low: float, high: float, least: float = 2.5) -> list[float]:
    """Multiples within `low` … `high` of the largest round step that fits `least` times or more.

    Round are 1, 2 and 5 times a power of ten. Raises ValueError unless `low` < `high`.
    """
    if not low < high:
        raise ValueError(f"no range between {low} and {high}")
    largest = (high - low) / least
    power = 10.0 ** math.floor(math.log10(largest))
    step = next(m * power for m in (5, 2, 1) if m == 1 or m * power <= largest * (1 + 1e-9))
    start = math.ceil(low / step - 1e-9)
    stop = math.floor(high / step + 1e-9)
    return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(start, stop + 1)]


def _tick(value: float, step: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 1e5 or (step < 1e-4 and abs(value) < 1e-2):
        return f"{value:.3g}".replace("e+0", "e").replace("e-0", "e-").replace("-", "−")
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:,.{decimals}f}".replace("-", "−")


def padded(values: Sequence[float]) -> tuple[float, float]:
    """A range that shows all of `values` with some air; from zero where zero is near."""
    low, high = min(values), max(values)
    if low == high:
        air = abs(low) * 0.1 or 1.0
        return low - air, high + air
    air = 0.06 * (high - low)
    if low >= 0 and low < 0.3 * high:
        return 0.0, high + air
    if high <= 0 and high > 0.3 * low:
        return low - air, 0.0
    return low - air, high + air


class _Frame:
    """The plotting area: from data to picture coordinates, and its axes as SVG."""

    def __init__(
        self, x: tuple[float, float], y: tuple[float, float], width: float, height: float
    ) -> None:
        self.x, self.y, self.width, self.height = x, y, width, height

    def px(self, value: float) -> float:
        low, high = self.x
        return _LEFT + (value - low) / (high - low) * (self.width - _LEFT - _RIGHT)

    def py(self, value: float) -> float:
        low, high = self.y
        return self.height - _BOTTOM - (value - low) / (high - low) * (self.height - _TOP - _BOTTOM)

    def path(self, points: Sequence[Point]) -> str:
        return "M" + "L".join(f"{self.px(x):.1f} {self.py(y):.1f}" for x, y in points)

    def area(self, band: Sequence[Band]) -> str:
        there = [(x, high) for x, _, high in band]
        back = [(x, low) for x, low, _ in reversed(band)]
        return self.path(there + back) + "Z"

    def axes(self, x_label: str) -> str:
        parts = []
        marks = ticks(*self.y)
        for value in marks:
            y = f"{self.py(value):.1f}"
            text = _tick(value, marks[1] - marks[0] if len(marks) > 1 else abs(value) or 1.0)
            parts.append(
                f'<line class="grid" x1="{_LEFT}" x2="{self.width - _RIGHT}" y1="{y}" y2="{y}"/>'
                f'<text class="tick" x="{_LEFT - 6}" y="{y}" dy=".32em" '
                f'text-anchor="end">{text}</text>'
            )
        marks = ticks(*self.x, least=3)
        base = self.height - _BOTTOM
        for value in marks:
            text = _tick(value, marks[1] - marks[0] if len(marks) > 1 else abs(value) or 1.0)
            parts.append(
                f'<text class="tick" x="{self.px(value):.1f}" y="{base + 15}" '
                f'text-anchor="middle">{text}</text>'
            )
        parts.append(
            f'<line class="axis" x1="{_LEFT}" x2="{self.width - _RIGHT}" y1="{base}" y2="{base}"/>'
        )
        label = Markup('<text class="tick label" x="{}" y="{}" text-anchor="end">{}</text>')
        parts.append(label.format(self.width - _RIGHT, self.height - 1, x_label))
        return "".join(parts)


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def _svg(width: float, height: float, title: str, body: str, hover: object = None) -> Markup:
    attribute = Markup(' data-hover="{}"').format(json.dumps(hover)) if hover else ""
    opening = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}"{}>')
    return opening.format(f"{width:g}", f"{height:g}", title, attribute) + Markup(f"{body}</svg>")


def _figure(title: str, legend: Sequence[tuple[str, int]], svg: Markup, note: str) -> Markup:
    keys = Markup("").join(
        Markup('<span class="key s{}">{}</span>').format(colour % COLOURS, name)
        for name, colour in legend
    )
    return Markup('<figure class="figure"><figcaption>{}</figcaption>{}{}{}</figure>').format(
        title,
        Markup('<div class="legend">{}</div>').format(keys) if legend else "",
        svg,
        Markup('<p class="note">{}</p>').format(note) if note else "",
    )


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str = "step",
    note: str = "",
    width: float = 380,
    height: float = 210,
) -> Markup:
    """Curves of finite points over a common x axis, with a legend where there are several."""
    drawn = [s for s in series if s.points]
    legend = list(dict.fromkeys((s.name, s.colour) for s in drawn)) if len(series) > 1 else []
    if not drawn:
        return _figure(title, legend, Markup('<p class="empty">no finite values</p>'), note)
    every = [p for s in drawn for p in (*s.points, *s.raw)]
    edges = [value for s in drawn for _, low, high in s.band for value in (low, high)]
    frame = _Frame(
        _range([x for x, _ in every]), padded([*(y for _, y in every), *edges]), width, height
    )
    parts = [frame.axes(x_label)]
    for s in drawn:
        parts.append(f'<g class="s{s.colour % COLOURS}">')
        if s.band:
            parts.append(f'<path class="band" d="{frame.area(s.band)}"/>')
        if s.raw:
            parts.append(f'<path class="raw" d="{frame.path(s.raw)}"/>')
        parts.append(f'<path class="line" d="{frame.path(s.points)}"/>')
        # few points are measurements one by one: each gets its dot
        shown = s.points if len(s.points) <= 24 else s.points[-1:]
        for x, y in shown:
            parts.append(f'<circle class="dot" cx="{frame.px(x):.1f}" cy="{frame.py(y):.1f}"/>')
        parts.append("</g>")
    hover = _hover(frame, x_label, [(s.name, s.colour, s.points) for s in drawn], frame.py)
    return _figure(title, legend, _svg(width, height, title, "".join(parts), hover), note)


def stacked_chart(
    title: str,
    layers: Sequence[Series],
    *,
    x_label: str = "step",
    width: float = 380,
    height: float = 210,
) -> Markup:
    """Values that add up, as areas on top of each other. All layers share their x values."""
    xs = [x for x, _ in layers[0].points]
    floor = [0.0] * len(xs)
    areas = []
    for layer in layers:
        top = [low + y for low, (_, y) in zip(floor, layer.points, strict=True)]
        areas.append((layer.colour, list(zip(xs, floor, top, strict=True))))
        floor = top
    frame = _Frame(_range(xs), (0.0, max(floor) * 1.06 or 1.0), width, height)
    body = "".join(
        f'<path class="layer s{colour % COLOURS}" d="{frame.area(band)}"/>'
        for colour, band in areas
    )
    hover = _hover(frame, x_label, [(s.name, s.colour, s.points) for s in layers], None)
    svg = _svg(width, height, title, body + frame.axes(x_label), hover)
    return _figure(title, [(s.name, s.colour) for s in layers], svg, "")


def _hover(
    frame: _Frame,
    x_label: str,
    series: Sequence[tuple[str, int, Sequence[Point]]],
    height_of: Callable[[float], float] | None,
) -> dict[str, object]:
    """What figures.js needs to read values under the pointer: positions and texts."""
    return {
        "label": x_label,
        "top": _TOP,
        "bottom": frame.height - _BOTTOM,
        "series": [
            {
                "name": visible(name),
                "colour": colour % COLOURS,
                "at": [
                    [
                        round(frame.px(x), 1),
                        round(height_of(y), 1) if height_of else None,
                        number(x, 6),
                        number(y),
                    ]
                    for x, y in points
                ],
            }
            for name, colour, points in series
        ],
    }


def whisker_chart(
    title: str, rows: Sequence[Whisker], *, label: str, note: str = "", width: float = 640
) -> Markup:
    """Each row's mean as a dot, its 95 % interval as a whisker, its seeds as small rings."""
    values = [v for row in rows for v in (row.mean, row.low, row.high, *row.values)]
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return _figure(title, [], Markup('<p class="empty">no finite values</p>'), note)
    low, high = min(known), max(known)
    air = 0.06 * (high - low) or abs(low) * 0.1 or 1.0
    height = 38.0 * len(rows) + _TOP + 40
    frame = _Frame((low - air, high + air), (0.0, 1.0), width, height)
    base = height - 36
    marks = ticks(*frame.x, least=3)
    parts = []
    for value in marks:
        x = f"{frame.px(value):.1f}"
        text = _tick(value, marks[1] - marks[0] if len(marks) > 1 else abs(value) or 1.0)
        parts.append(
            f'<line class="grid" x1="{x}" x2="{x}" y1="{_TOP}" y2="{base}"/>'
            f'<text class="tick" x="{x}" y="{base + 15}" text-anchor="middle">{text}</text>'
        )
    tag = Markup('<text class="tick label" x="{}" y="{}" text-anchor="end">{}</text>')
    parts.append(tag.format(width - _RIGHT, base + 31, label))
    for i, row in enumerate(rows):
        parts.append(_whisker_row(frame, row, _TOP + 38.0 * i))
    return _figure(title, [], _svg(width, height, title, "".join(parts)), note)


def _whisker_row(frame: _Frame, row: Whisker, top: float) -> str:
    line = top + 26
    name = Markup('<text class="row" x="4" y="{}">{}</text>').format(top + 13, row.name)
    value = (
        f'<text class="row value" x="{frame.width - 4}" y="{top + 13}">{number(row.mean)}</text>'
    )
    marks = []
    if math.isfinite(row.low) and math.isfinite(row.high):
        left, right = frame.px(row.low), frame.px(row.high)
        marks.append(
            f'<path class="whisker" d="M{left:.1f} {line}H{right:.1f}'
            f'M{left:.1f} {line - 4}v8M{right:.1f} {line - 4}v8"/>'
        )
    marks += [
        f'<circle class="ring" cx="{frame.px(v):.1f}" cy="{line}"/>'
        for v in row.values
        if math.isfinite(v)
    ]
    if math.isfinite(row.mean):
        marks.append(f'<circle class="mean" cx="{frame.px(row.mean):.1f}" cy="{line}"/>')
    return f'<g class="s{row.colour % COLOURS}">{name}{value}{"".join(marks)}</g>'


def sparkline(points: Sequence[Point], *, width: float = 96, height: float = 22) -> Markup:
    """A word-sized curve without axes; empty where fewer than two points are finite."""
    points, _ = finite(points)
    if len(points) < 2:
        return Markup("")
    (x0, x1), (y0, y1) = _range([x for x, _ in points]), padded([y for _, y in points])
    placed = [
        (3 + (x - x0) / (x1 - x0) * (width - 6), height - 3 - (y - y0) / (y1 - y0) * (height - 6))
        for x, y in points
    ]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in placed)
    x, y = placed[-1]
    return Markup(
        f'<svg class="spark s0" viewBox="0 0 {width:g} {height:g}" aria-hidden="true">'
        f'<path class="line" d="{path}"/><circle class="dot" cx="{x:.1f}" cy="{y:.1f}"/></svg>'
    )
