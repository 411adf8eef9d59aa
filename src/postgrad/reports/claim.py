"""The page of a reproduced claim: its verdict in plain words, all arms, curves, numbers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from postgrad.evaluation.statistics import mean_interval
from postgrad.reports.figures import number, whisker_chart
from postgrad.reports.intervals import (
    BAND_NOTE,
    INTERVAL_NOTE,
    banded_chart,
    interval_table,
    mean_cell,
    whisker,
)
from postgrad.reports.page import duration, paper_facts, render_page, templates, write_page

_HEADLINES = {
    "yes": "The claim holds here.",
    "no": "The claim does not reproduce here.",
    "not separable": "The claim is not separable at this size.",
}


@dataclass(frozen=True)
class ClaimParts:
    """A claim's result as pieces of a page, used by the report and by the documentation."""

    verdict: Markup
    whiskers: Markup
    curves: list[Markup]
    findings: Markup | None
    table: Markup
    notes: str
    versions: str


def write_claim_report(result: Mapping[str, Any], path: str | Path) -> Path:
    """Write the page of a result of `postgrad.claims.run.reproduce` to `path`."""
    seeds = result["seeds"]
    text = render_page(
        "claim.html",
        about=paper_facts(result["slug"]),
        facts=[
            ("Metric", result["metric"]),
            ("Seeds", str(seeds)),
            ("Arms", str(len(result["arms"]))),
            ("Computing time", duration(result["seconds"])),
        ],
        parts=claim_parts(result),
        seeds=seeds,
        band_note=BAND_NOTE,
        interval_note=INTERVAL_NOTE,
    )
    return write_page(Path(path), text)


def claim_parts(result: Mapping[str, Any]) -> ClaimParts:
    """The result of a claim as pieces of a page."""
    metric, arms = result["metric"], result["arms"]
    better = "higher is better" if result["higher_is_better"] else "lower is better"
    colours = _colours(result)
    note = (
        "Dot: mean over seeds. Whisker: its 95 % interval. Rings: the seeds."
        if result["seeds"] > 1
        else "One seed: there is no interval."
    )
    every = [curves for seeds in result["curves"].values() for curves in seeds]
    names = list(dict.fromkeys(name for curves in every for name in curves))
    return ClaimParts(
        verdict=_verdict(result, better),
        whiskers=whisker_chart(
            f"{metric}, all arms",
            [whisker(arm, values[metric], colours[arm]) for arm, values in arms.items()],
            label=f"{metric} ({better})",
            note=note,
        ),
        curves=[_curve(name, result["curves"], colours) for name in names],
        findings=_findings(result),
        table=interval_table(arms, metric),
        notes=result["notes"],
        versions=", ".join(f"{name} {text}" for name, text in result["versions"].items()),
    )


def verdict_text(result: Mapping[str, Any]) -> str:
    """The verdict in plain words, two sentences: what came out, and by how much."""
    return f"{_headline(result)} {_sentence(result)}"


def _headline(result: Mapping[str, Any]) -> str:
    return _HEADLINES.get(result["holds"], f"{result['holds'].capitalize()}.")


def _sentence(result: Mapping[str, Any]) -> str:
    metric, sides = result["metric"], (result["method"], result["baseline"])
    method, baseline = (f"{side['name']} {number(side['mean'])}" for side in sides)
    values = [result["arms"][side["name"]][metric] for side in sides]
    gap = mean_interval([m - b for m, b in zip(*values, strict=True)])
    text = f"{metric}: {method} against {baseline}, a difference of {number(gap.mean, 3)}"
    if result["seeds"] > 1:
        text += f" (95 % interval {number(gap.low, 3)} to {number(gap.high, 3)}, seed by seed)"
    return f"{text}."


def _verdict(result: Mapping[str, Any], better: str) -> Markup:
    kind = {"yes": "yes", "no": "no"}.get(result["holds"], "open")
    detail = (
        f"Task: {result['task']}. {result['seeds']} seeds; {better}. The claim holds if the "
        "interval of the differences lies wholly on the method's side of zero, does not reproduce "
        "if wholly on the other side, and is not separable if zero lies within."
    )
    text = (
        templates()
        .get_template("verdict.html")
        .render(
            kind=kind,
            headline=_headline(result),
            claim=f"“{result['claim']}”",
            sentence=_sentence(result),
            detail=detail,
        )
    )
    return Markup(text)


def _findings(result: Mapping[str, Any]) -> Markup | None:
    """A study's results as a table: statement, both sides, verdict."""
    rows = [
        {
            "statement": finding["statement"],
            "metric": finding["metric"],
            "sides": [
                {"name": side["name"], **mean_cell(result["arms"][side["name"]][finding["metric"]])}
                for side in (finding["method"], finding["baseline"])
            ],
            "holds": finding["holds"],
        }
        for finding in result.get("findings", ())
    ]
    if not rows:
        return None
    return Markup(templates().get_template("findings.html").render(rows=rows))


def _curve(name: str, curves: Mapping[str, Any], colours: Mapping[str, int]) -> Markup:
    """The figure of a curve; one called `y over x` names its x axis, that of others is the step."""
    having = {arm: [seed[name] for seed in seeds if name in seed] for arm, seeds in curves.items()}
    having = {arm: points for arm, points in having.items() if points}
    _, _, over = name.rpartition(" over ") if " over " in name else ("", "", "step")
    return banded_chart(name, having, colours, x_label=over)


def _colours(result: Mapping[str, Any]) -> dict[str, int]:
    """The method blue, its baseline orange, the other arms in order."""
    leading = [result["method"]["name"], result["baseline"]["name"]]
    others = [arm for arm in result["arms"] if arm not in leading]
    return {arm: colour for colour, arm in enumerate([*leading, *others])}
