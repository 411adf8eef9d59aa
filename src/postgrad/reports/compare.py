"""The page of a comparison: several methods on the same axes, and what each ended with."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from postgrad.reports.curves import Point, points_by_name
from postgrad.reports.figures import Series, line_chart, whisker_chart
from postgrad.reports.intervals import BAND_NOTE, banded_chart, interval_table, whisker
from postgrad.reports.page import duration, paper_facts, render_page, write_page

_DIVERGENCE = "kl"  # the metric's name in evaluations


def write_compare_report(
    runs: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    title: str,
    config: Mapping[str, Any],
) -> Path:
    """Write the page of a comparison to `path`.

    Each of `runs` is one method under one seed: `{"method": slug, "seed": n, "metrics": rows}` with
    the rows of its metrics.jsonl, and `"samples": n` where it is known how many it consumed.
    `config` is what all runs were given. Raises ValueError without runs.
    """
    if not runs:
        raise ValueError("no runs to compare")
    methods = list(dict.fromkeys(run["method"] for run in runs))
    colours = {method: i for i, method in enumerate(methods)}
    curves = {
        method: [points_by_name(run["metrics"]) for run in runs if run["method"] == method]
        for method in methods
    }
    seeds = sorted({run["seed"] for run in runs})
    final = _final(curves)
    text = render_page(
        "compare.html",
        title=title,
        facts=[
            ("Methods", str(len(methods))),
            ("Seeds", ", ".join(map(str, seeds))),
            *((key, str(value)) for key, value in config.items() if value is not None),
        ],
        methods=[
            {**paper_facts(method), **_effort(method, runs, curves[method])} for method in methods
        ],
        colours=colours,
        table=interval_table(final) if any(final.values()) else "",
        whiskers=[
            whisker_chart(
                name.replace("_", " "),
                [
                    whisker(method, final[method][name], colours[method])
                    for method in methods
                    if name in final[method]
                ],
                label=name.replace("_", " "),
                width=440,
            )
            for name in _shared(final)
        ],
        groups=_groups(curves, colours),
        several=len(seeds) > 1,
        band_note=BAND_NOTE,
    )
    return write_page(Path(path), text)


def _final(curves: Mapping[str, Sequence[Mapping[str, list[Point]]]]) -> dict[str, dict[str, Any]]:
    """The last value of every evaluation metric that all seeds of a method have."""
    return {
        method: {
            name.removeprefix("evaluation/"): [seed[name][-1][1] for seed in seeds]
            for name in seeds[0]
            if name.startswith("evaluation/") and all(name in seed for seed in seeds)
        }
        for method, seeds in curves.items()
    }


def _shared(values: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The names that at least two methods (or the only one) have, in order of appearance."""
    names = dict.fromkeys(name for own in values.values() for name in own)
    enough = min(2, len(values))
    return [name for name in names if sum(name in own for own in values.values()) >= enough]


def _effort(
    method: str,
    runs: Sequence[Mapping[str, Any]],
    seeds: Sequence[Mapping[str, list[Point]]],
) -> dict[str, str]:
    """Steps, samples and seconds of one run of a method, averaged over its seeds."""
    own = [run for run in runs if run["method"] == method]
    steps = [max((points[-1][0] for points in seed.values()), default=0.0) for seed in seeds]
    seconds = [sum(y for _, y in seed.get("time/step", [])) for seed in seeds]
    samples = [run["samples"] for run in own if "samples" in run]
    return {
        "seeds": str(len(own)),
        "steps": f"{sum(steps) / len(steps):,.0f}",
        "samples": f"{sum(samples) / len(samples):,.0f}" if samples else "–",
        "time": duration(sum(seconds) / len(seconds)),
    }


def _groups(
    curves: Mapping[str, Sequence[Mapping[str, list[Point]]]], colours: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Figures of the metrics that several methods share: evaluations first, then training."""
    figures: dict[str, list[Any]] = {"Evaluation": [], "Training": [], "Time": []}
    have = {method: {name for seed in seeds for name in seed} for method, seeds in curves.items()}
    ordered = dict.fromkeys(name for seeds in curves.values() for seed in seeds for name in seed)
    enough = min(2, len(curves))
    for name in ordered:
        if sum(name in own for own in have.values()) < enough:
            continue
        prefix = name.split("/")[0]
        group = {"evaluation": "Evaluation", "time": "Time", "throughput": "Time"}.get(prefix)
        arms = {
            method: [seed[name] for seed in seeds if name in seed]
            for method, seeds in curves.items()
            if name in have[method]
        }
        shown = name.removeprefix("evaluation/").replace("_", " ").replace("/", " / ")
        figures[group or "Training"].append(banded_chart(shown, arms, colours, x_label="step"))
    figures["Evaluation"] = [*_frontiers(curves, colours), *figures["Evaluation"]]
    return [{"name": name, "figures": made} for name, made in figures.items() if made]


def _frontiers(
    curves: Mapping[str, Sequence[Mapping[str, list[Point]]]], colours: Mapping[str, int]
) -> list[Markup]:
    """What is gained over the divergence from the reference that it costs, seed by seed."""
    made = []
    for gain in ("reward", "win_rate"):
        names = f"evaluation/{gain}", f"evaluation/{_DIVERGENCE}"
        series = [
            Series(method, _against(*(seed[name] for name in names)), colours[method])
            for method, seeds in curves.items()
            for seed in seeds
            if all(name in seed for name in names)
        ]
        if series:
            title = f"{gain.replace('_', ' ')} over KL to the reference"
            made.append(
                line_chart(
                    title, series, x_label="KL in nats", note="A path a seed, from step to step."
                )
            )
    return made


def _against(gains: Sequence[Point], costs: Sequence[Point]) -> list[Point]:
    """Points (cost, gain) of the steps at which both were measured, as far as they are finite."""
    at = dict(costs)
    points = [(at[step], gain) for step, gain in gains if step in at]
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
