"""Runs in a terminal: curves of dots and the newest samples, as lines of text."""

import fnmatch
import math
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from postgrad.errors import PostgradError, unknown
from postgrad.reports.curves import Point, by_importance, finite, readable, spoken
from postgrad.reports.figures import number, padded
from postgrad.reports.following import ENDED, Followed
from postgrad.reports.page import duration
from postgrad.reports.samples import sample
from postgrad.training.record import is_run
from postgrad.visible import shortened, visible

_STYLES = ("blue", "yellow", "green", "magenta", "red", "cyan", "bright_black", "white")
_NARROWEST, _WIDEST = 34, 60  # columns of a chart
_TALL = 9  # lines of a chart with its title and its axis
_BY_DEFAULT = 6  # charts
_LABEL = 9  # columns of a chart's numbers
_STATES = {"running": "green", "finished": "blue", "stopped": "yellow", "unknown": "bright_black"}
_LONGEST_TEXT = 2000
_PLAIN = str.maketrans("−–·●…", "---*.")  # for terminals that have ASCII only


def watch(
    folders: Sequence[Path],
    *,
    metrics: Sequence[str] = (),
    once: bool = False,
    every: float = 2.0,
    patience: float | None = None,
    console: Console | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Show runs until all have ended, or only once; where there is no terminal, once.

    Args:
        folders: run folders; those that do not exist yet are waited for.
        metrics: names or patterns (`evaluation/*`); the most important ones when empty.
        every: seconds between looks at the files.
        patience: how many seconds to wait for a folder; None: 0 if shown once, else without end.

    Raises:
        PostgradError: a folder is no run in time, or no run has such a metric.
    """
    console = console or Console(highlight=False)
    once = once or not console.is_terminal
    patience = patience if patience is not None else (0.0 if once else math.inf)
    runs = [_awaited(folder, patience, every, console, sleep) for folder in folders]
    try:
        _take_in(runs)
        if not once and not _all_ended(runs):
            with Live(console=console, screen=True, auto_refresh=False) as live:
                while not _all_ended(runs):
                    live.update(_frame(runs, metrics, console, console.height), refresh=True)
                    sleep(every)
                    _take_in(runs)
        _require(metrics, runs)
        console.print(_frame(runs, metrics, console, None))
    finally:
        for run in runs:
            run.close()


def _awaited(
    folder: Path,
    patience: float,
    every: float,
    console: Console,
    sleep: Callable[[float], None],
) -> Followed:
    started = time.monotonic()
    told = False
    while not is_run(folder):
        left = patience - (time.monotonic() - started)
        if left <= 0:
            after = f" after {patience:g} seconds" if patience else ""
            raise PostgradError(f"{folder} is not a run folder{after}")
        if not told:
            console.print(Text(visible(f"waiting for {folder} … (Ctrl-C ends this)")))
            told = True
        sleep(min(every, left))
    return Followed(folder.resolve(), folder.name or str(folder))


def _take_in(runs: Sequence[Followed]) -> None:
    for run in runs:
        run.catch_up()


def _all_ended(runs: Sequence[Followed]) -> bool:
    return all(run.state.name in ENDED for run in runs)


def _require(metrics: Sequence[str], runs: Sequence[Followed]) -> None:
    known = {name for run in runs for name in run.curves}
    for pattern in metrics:
        if known and not fnmatch.filter(known, pattern):
            raise unknown("metric", pattern, known)


def _frame(
    runs: Sequence[Followed], metrics: Sequence[str], console: Console, height: int | None
) -> Group:
    """All that is shown, at most `height` lines where that is given."""
    width = max(console.width, 10)
    dots = not console.options.ascii_only
    lines = [
        part
        for i, run in enumerate(runs)
        for line in _headline(run, i, len(runs) > 1)
        for part in line.wrap(console, width)
    ]
    room = math.inf if height is None else height - len(lines) - 1
    chosen = _chosen(runs, metrics)
    columns = max(1, width // (_NARROWEST + 2)) if width >= _NARROWEST else 0
    least_text = 5  # lines that samples should have
    fitting = columns * max(0, int(min(room - least_text, 1e6)) // _TALL)
    if fitting == 0:  # a line for each
        most = int(min(max(1, room - least_text), 1e6))
        lines += [_one_line(name, runs, width, dots) for name in chosen[:most]]
    else:
        shown = chosen[: fitting if metrics else min(fitting, _BY_DEFAULT)]
        columns = min(columns, max(1, len(shown)))
        size = min(_WIDEST, (width - 2 * (columns - 1)) // columns)
        for start in range(0, len(shown), columns):
            row = [_chart(name, runs, size, dots) for name in shown[start : start + columns]]
            lines += [Text("  ").join(parts) for parts in zip(*row, strict=True)]
    left = math.inf if height is None else height - len(lines) - 1
    lines += _samples(runs, width, left, console)
    if height is not None:
        lines = lines[: height - 1]
    for line in lines:
        line.no_wrap = True
        if not dots:
            line.plain = line.plain.translate(_PLAIN)
        line.truncate(width, overflow="ellipsis" if dots else "crop")
    return Group(*lines)


def _headline(run: Followed, index: int, several: bool) -> list[Text]:
    """Name, state and progress of a run, and what is odd about it."""
    about = run.description
    line = Text()
    if several:
        line.append("● ", _STYLES[index % len(_STYLES)])
    line.append(visible(run.name), "bold")
    line.append(f"  {visible(about.method)}")
    state = run.state
    line.append(f"  {state.name}", _STATES.get(state.name, "red"))
    line.append(f"  step {run.step:,} of {about.steps:,}")
    seconds = [value for _, value in run.curves.get("time/step", [])[-20:]]
    if state.name == "running" and seconds and run.step < about.steps:
        left = (about.steps - run.step) * sum(seconds) / len(seconds)
        line.append(f"  about {duration(left)} left", "bright_black")
    age = run.age()
    if state.name in ("running", "unknown") and age is not None:
        line.append(f"  last row {duration(age)} ago", "bright_black")
    lines = [line]
    if state.why:
        lines.append(Text(visible(state.why), "red"))
    last = {
        name.removeprefix("evaluation/"): points[-1]
        for name, points in run.curves.items()
        if name.startswith("evaluation/")
    }
    if last:
        step = max(step for step, _ in last.values())
        values = [f"{spoken(name)} {number(y)}" for name, (x, y) in last.items() if x == step]
        lines.append(Text(visible(f"evaluation after step {step:,.0f}: {', '.join(values)}")))
    if run.damaged:
        lines.append(Text(f"{run.damaged} lines of metrics.jsonl are not readable", "red"))
    return lines


def _chosen(runs: Sequence[Followed], metrics: Sequence[str]) -> list[str]:
    """The metrics to draw: those asked for, or the first by importance that are curves."""
    names = list(dict.fromkeys(name for run in runs for name in run.curves))
    if metrics:
        found = [fnmatch.filter(names, pattern) or [pattern] for pattern in metrics]
        return list(dict.fromkeys(name for part in found for name in part))
    drawable = [name for name in names if any(len(run.curves.get(name, ())) > 2 for run in runs)]
    timeless = [name for name in drawable if not name.startswith("time/")]
    return by_importance(timeless or names)


def _lines(name: str, runs: Sequence[Followed]) -> list[tuple[list[Point], str, bool]]:
    """Each run's curve with its style, and whether values were left out of it."""
    found = []
    for i, run in enumerate(runs):
        known, odd = finite(run.curves.get(name, []))
        if known or odd:
            found.append((readable(known)[0], _STYLES[i % len(_STYLES)], bool(odd)))
    return found


def _one_line(name: str, runs: Sequence[Followed], width: int, dots: bool) -> Text:
    line = Text(f"{visible(spoken(name))} ")
    for points, style, odd in _lines(name, runs):
        line.append(f"{number(points[-1][1]) if points else '–'}{'!' if odd else ''} ", style)
    room = min(30, width - line.cell_len)
    if room >= 6:
        body = _plot([(points, style) for points, style, _ in _lines(name, runs)], room, 1, dots)
        line.append_text(body[0])
    return line


def _chart(name: str, runs: Sequence[Followed], width: int, dots: bool) -> list[Text]:
    """A curve with title, highest and lowest value and range of steps: `_TALL` lines of `width`."""
    found = _lines(name, runs)
    title = Text(visible(spoken(name)), "bold")
    for points, style, odd in found:
        if points:
            title.append(f" {number(points[-1][1])}", style)
        if odd:
            title.append(" (some not finite)", "red")
    every = [point for points, _, _ in found for point in points]
    size = width - _LABEL
    plot = _plot([(points, style) for points, style, _ in found], size, _TALL - 2, dots)
    labels = [""] * len(plot)
    axis = ""
    if every:
        low, high = padded([y for _, y in every])
        labels[0], labels[-1] = number(high, 3), number(low, 3)
        first, last = (f"{pick(x for x, _ in every):,.0f}" for pick in (min, max))
        axis = first + last.rjust(size - len(first))
    else:
        labels[0] = "no values"
    lines = [title]
    for label, row in zip(labels, plot, strict=True):
        lines.append(Text(f"{label:>{_LABEL - 1}} ", "bright_black").append_text(row))
    lines.append(Text(" " * _LABEL + axis, "bright_black"))
    for line in lines:
        line.truncate(width, overflow="crop", pad=True)
    return lines


def _plot(
    curves: Sequence[tuple[Sequence[Point], str]], columns: int, rows: int, dots: bool
) -> list[Text]:
    """Curves over a common range as rows of braille dots, or of asterisks; the last one on top."""
    wide, tall = (2, 4) if dots else (1, 1)  # dots of a cell
    cells: dict[tuple[int, int], tuple[int, str]] = {}
    every = [point for points, _ in curves for point in points]
    if every:
        low, high = padded([y for _, y in every])
        first, last = min(x for x, _ in every), max(x for x, _ in every)
        right, bottom = columns * wide - 1, rows * tall - 1
        for points, style in curves:
            placed = [
                (
                    round((x - first) / (last - first) * right) if last > first else 0,
                    bottom - round((y - low) / (high - low) * bottom),
                )
                for x, y in points
            ]
            for x, y in _joined(placed):
                cell = y // tall, x // wide
                before = cells.get(cell, (0, ""))[0]
                cells[cell] = before | _BRAILLE[y % 4][x % 2] if dots else 1, style
    lines = []
    for row in range(rows):
        line = Text()
        for column in range(columns):
            mark, style = cells.get((row, column), (0, ""))
            line.append(" " if not mark else chr(0x2800 + mark) if dots else "*", style)
        lines.append(line)
    return lines


# the bit of each dot of a braille character, by row and column
_BRAILLE = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


def _joined(placed: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The dots of the straight lines between neighbouring places."""
    dots = list(placed[:1])
    for (x0, y0), (x1, y1) in pairwise(placed):
        parts = max(abs(x1 - x0), abs(y1 - y0), 1)
        dots += [
            (x0 + round((x1 - x0) * i / parts), y0 + round((y1 - y0) * i / parts))
            for i in range(1, parts + 1)
        ]
    return dots


def _samples(runs: Sequence[Followed], width: int, room: float, console: Console) -> list[Text]:
    """The newest samples, as many as `room` lines hold: each run's first, then its others."""
    most = 3 if len(runs) == 1 else 1
    lines: list[Text] = []
    for run in runs:
        for row in run.samples(most):
            shown = sample(row)
            numbers = [
                f"{name} {number(value) if isinstance(value, (int, float)) else value}"
                for name, value in shown["numbers"]
            ]
            title = f"sample of step {row['step']:,}"
            title += f" of {run.name}" if len(runs) > 1 else ""
            head = Text(visible(" · ".join([title, *numbers])), "bold")
            block = [Text(), *head.wrap(console, width)[:4]]
            texts = [*shown["texts"], *_before_and_after(shown["pairs"])]
            if "tokens" in shown and "response" not in dict(texts):
                texts.append(["response", "".join(shown["tokens"])])
            for name, text in texts:
                made = Text(f"{name}: ", "bright_black")
                made.append(shortened(text, _LONGEST_TEXT), "default")
                block += list(made.wrap(console, width, tab_size=4))[: 3 if name == "prompt" else 8]
            if len(lines) + len(block) > room and lines:
                return lines
            lines += block
    return lines


def _before_and_after(pairs: Sequence[tuple[str, str, str]]) -> list[list[str]]:
    return [
        [f"{name} {when}", text]
        for name, before, after in pairs
        for when, text in (("before", before), ("after", after))
    ]
