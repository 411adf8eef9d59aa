"""The report of a run: one self-contained page from what the run folder holds."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from markupsafe import Markup

from postgrad.config import LoopSettings, flat, read_yaml
from postgrad.errors import PostgradError
from postgrad.reports.curves import (
    LEADING,
    Point,
    finite,
    points_by_name,
    prefix,
    readable,
    spoken,
    thin,
)
from postgrad.reports.figures import Series, line_chart, number, sparkline, stacked_chart
from postgrad.reports.page import duration, paper_facts, render_page, write_page
from postgrad.reports.samples import browser
from postgrad.training.record import (
    CONFIG,
    METRICS,
    PROFILE,
    RUN,
    SAMPLES,
    TRACE,
    is_run,
    read_rows,
)

REPORT = "report.html"
_OTHER = 7  # grey
_OPERATORS = 15  # rows of the operators' table; the profile has more


def write_run_report(folder: str | Path) -> Path:
    """Write `report.html` into a run folder, from its configuration, metrics and samples.

    Raises `PostgradError` if the folder holds no run or cannot be written.
    """
    folder = Path(folder)
    if not is_run(folder):
        raise PostgradError(f"{folder} is not a run folder: it has no {CONFIG} and {RUN}")
    config = read_yaml(folder / CONFIG)
    run = json.loads((folder / RUN).read_text(encoding="utf-8"))
    rows = read_rows(folder / METRICS)
    curves = points_by_name(rows)
    evaluations = {
        name.removeprefix("evaluation/"): points
        for name, points in curves.items()
        if name.startswith("evaluation/")
    }
    samples = browser(read_rows(folder / SAMPLES))
    text = render_page(
        "run.html",
        scripts=("cards.js", "samples.js") if samples["steps"] else (),
        about=paper_facts(run["method"]),
        facts=_facts(config, run, curves),
        **_evaluation_table(evaluations),
        groups=_groups(curves),
        watched=[_curve(name, points) for name, points in evaluations.items() if len(points) > 2],
        time=_time(curves),
        profile=_profile(folder / PROFILE),
        samples=samples,
        settings=_settings(config),
        config_text=(folder / CONFIG).read_text(encoding="utf-8"),
        provenance=_provenance(run),
        folder=folder.resolve().name,
    )
    return write_page(folder / REPORT, text)


def _facts(
    config: Mapping[str, Any], run: Mapping[str, Any], curves: Mapping[str, Sequence[Point]]
) -> list[tuple[str, str]]:
    done = int(max((points[-1][0] for points in curves.values()), default=0))
    steps = f"{done:,}" if done == config["steps"] else f"{done:,} of {config['steps']:,}"
    started = datetime.strptime(run["started"], "%Y-%m-%dT%H:%M:%S%z")
    keys = [key for key in ("model", "data", "environment", "reward") if config.get(key)]
    facts = [(key.capitalize(), _named(config[key])) for key in keys]
    facts += [("Steps", steps), ("Seed", str(config["seed"]))]
    if "time/step" in curves:
        spent = sum(seconds for _, seconds in curves["time/step"])
        facts.append(("Training time", duration(spent)))
    facts.append(("Started", started.strftime("%d %B %Y, %H:%M")))
    return facts


def _named(value: Any) -> str:
    """What a setting is called that may be a name, a mapping with a name, or a list of those."""
    if isinstance(value, Mapping):
        return str(value.get("name", "")) or json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        return ", ".join(map(_named, value))
    return str(value)


def _evaluation_table(evaluations: Mapping[str, Sequence[Point]]) -> dict[str, Any]:
    """Every metric at the first and at the last evaluation, where it was measured there."""
    steps = sorted({step for points in evaluations.values() for step, _ in points})
    first, last = (steps[0], steps[-1]) if steps else (0.0, 0.0)
    rows = []
    for name, points in evaluations.items():
        values = dict(points)
        before = values.get(first) if first < last or first == 0 else None
        after = values.get(last) if first < last or last > 0 else None
        change = "–"
        if before is not None and after is not None:
            change = ("+" if after > before else "") + number(after - before, 3)
        rows.append(
            {
                "name": spoken(name),
                "before": "–" if before is None else number(before),
                "after": "–" if after is None else number(after),
                "change": change,
                "spark": sparkline(thin(points, 60)),
            }
        )
    return {
        "evaluations": rows,
        "before": "Before training" if first == 0 else f"After step {first:,.0f}",
        "after": f"After step {last:,.0f}" if last else "After training",
    }


def _groups(curves: Mapping[str, Sequence[Point]]) -> list[dict[str, Any]]:
    """The figures of training metrics by prefix; prefixes with one metric go together."""
    by_prefix: dict[str, list[str]] = {}
    for name in curves:
        if prefix(name) not in ("evaluation", "time", "throughput"):
            by_prefix.setdefault(prefix(name), []).append(name)
    together = by_prefix.pop("", [])
    for first in [first for first, names in by_prefix.items() if len(names) == 1]:
        single = by_prefix.pop(first)
        together = single + together if first in LEADING else together + single
    order = [*LEADING, "training", *sorted(by_prefix.keys() - set(LEADING))]
    groups = {**by_prefix, "training": together}
    return [
        {
            "id": f"metrics-{first}",
            "name": first.replace("_", " ").capitalize(),
            "figures": _figures({name.removeprefix(f"{first}/"): curves[name] for name in names}),
        }
        for first in order
        if (names := groups.get(first))
    ]


def _figures(curves: Mapping[str, Sequence[Point]]) -> list[Markup]:
    """A figure for each metric; metrics that differ in a last number only are lines of one."""
    stems: dict[str, list[str]] = {}
    for name in curves:
        stems.setdefault(re.sub(r"[_/]?\d+$", "", name), []).append(name)
    figures = []
    for stem, names in stems.items():
        if len(names) < 3:
            figures += [_curve(name, curves[name]) for name in names]
            continue
        series = [
            Series(name.removeprefix(stem).strip("_/") or stem, thin(finite(curves[name])[0]), i)
            for i, name in enumerate(names)
        ]
        odd = sum(len(curves[name]) - len(finite(curves[name])[0]) for name in names)
        note = f"Values that are not finite are left out: {odd}." if odd else ""
        figures.append(line_chart(spoken(stem), series, note=note))
    return figures


def _curve(name: str, points: Sequence[Point]) -> Markup:
    title = spoken(name)
    known, note = finite(points)
    line, raw = readable(known)
    return line_chart(title, [Series(title, line, raw=raw)], note=note)


def _time(curves: Mapping[str, Sequence[Point]]) -> dict[str, Any] | None:
    """Where the seconds went: totals by stretch, the split over steps, and rates."""
    if "time/step" not in curves:
        return None
    whole = dict(curves["time/step"])
    stretches = {
        name.removeprefix("time/"): dict(points)
        for name, points in curves.items()
        if name.startswith("time/") and name != "time/step"
    }
    named = {x: sum(seconds.get(x, 0.0) for seconds in stretches.values()) for x in whole}
    rest = {x: max(0.0, total - named[x]) for x, total in whole.items()}
    layers = {**stretches, "other": rest}
    colours = {name: _OTHER if name == "other" else i % _OTHER for i, name in enumerate(layers)}
    total = sum(whole.values())
    parts = []
    for name, seconds in layers.items():
        spent = sum(seconds.values())
        share = f"{100 * spent / total:.0f} %" if total else "–"
        parts.append({"name": name, "colour": colours[name], "seconds": spent, "share": share})
    xs = sorted(whole)
    size = -(-len(xs) // 240)
    buckets = [xs[i : i + size] for i in range(0, len(xs), size)]
    stacked = [
        Series(
            name,
            [(b[-1], sum(seconds.get(x, 0.0) for x in b) / len(b)) for b in buckets],
            colours[name],
        )
        for name, seconds in layers.items()
    ]
    figures = [stacked_chart("seconds per step", stacked)] if len(xs) > 1 else []
    figures += [
        _curve(name.removeprefix("throughput/"), points)
        for name, points in curves.items()
        if name.startswith("throughput/")
    ]
    return {"total": total, "parts": parts, "figures": figures}


def _profile(path: Path) -> dict[str, Any] | None:
    """What `profile=true` measured of the steps, their memory and operators, as texts."""
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    step = found["step"]
    rows = [_cost(name, part) for name, part in found["stretches"].items()]
    prices = step["microseconds_per_token"]
    whole = {
        "seconds": step["seconds"],
        "share": 1.0,
        "microseconds_per_token": prices["trained"],
    }
    measured, traced = (_range(found["steps"][kind]) for kind in ("measured", "traced"))
    facts = [
        ("Device", found["device"]),
        ("CPU threads", str(found["threads"])),
        ("Steps measured", measured),
        ("Steps traced", traced),
    ]
    for kind, price in prices.items():
        if price is not None:
            facts.append((f"Tokens {kind} per step", f"{step['tokens'][kind]:,}"))
            facts.append((f"Per {kind} token", f"{number(price, 3)} µs"))
    facts += [
        (f"Peak memory ({where})", f"{number(size / 2**30, 3)} GiB")
        for where, size in found["peak_memory"].items()
    ]
    return {
        "facts": facts,
        "stretches": rows,
        "step": _cost("step", whole),
        "between": [
            {"name": name, "times": part["times"], "seconds": _seconds(part["seconds"])}
            for name, part in found["between_steps"].items()
        ],
        "operators": [
            {
                "name": row["name"],
                "seconds": _seconds(row["seconds"]),
                "share": f"{100 * row['share']:.1f} %",
                "calls": f"{row['calls']:,}",
            }
            for row in found["operators"][:_OPERATORS]
        ],
        "trace": TRACE,
    }


def _cost(name: str, part: Mapping[str, Any]) -> dict[str, str]:
    price = part["microseconds_per_token"]
    return {
        "name": name,
        "seconds": _seconds(part["seconds"]),
        "share": f"{100 * part['share']:.1f} %",
        "price": "–" if price is None else number(price, 3),
    }


def _seconds(value: float) -> str:
    return number(value, 3) if value >= 1e-3 or value == 0 else "< 0.001"


def _range(steps: Sequence[int]) -> str:
    if len(steps) < 2:
        return ", ".join(map(str, steps)) or "–"
    return f"{steps[0]:,} to {steps[-1]:,}"


def _settings(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The method's own settings and the loop's, these with their meanings and what was changed."""
    loop = set(LoopSettings.model_fields)
    usual = flat(LoopSettings())
    own = {key: value for key, value in config.items() if key not in {*loop, "method"}}
    shared = {key: value for key, value in config.items() if key in loop}
    return [
        {
            "name": "the method",
            "rows": [
                {"key": key, "value": _shown(value), "meaning": "", "changed": False}
                for key, value in flat(own).items()
            ],
        },
        {
            "name": "the training loop",
            "rows": [
                {
                    "key": key,
                    "value": _shown(value),
                    "meaning": LoopSettings.model_fields[key].description,
                    "changed": value != usual[key],
                }
                for key, value in flat(shared).items()
            ],
        },
    ]


def _shown(value: Any) -> str:
    if value is None or value == "":
        return "—"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _provenance(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    program, *words = run["command"]
    return [
        ("Command", shlex.join([Path(program).name, *words])),
        ("Started", run["started"]),
        ("Machine", run["machine"]),
        ("Python", run["python"]),
        *((name, text) for name, text in run["versions"].items()),
        *((f"Fingerprint of {name}", text) for name, text in run["data"].items()),
    ]
