"""Running a claim: every arm under every seed, resumable, and the verdict with its intervals."""

import json
import math
import os
import platform
import re
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from postgrad import __version__
from postgrad.claims.base import Claim, Finding, Outcome, load_claim
from postgrad.errors import PostgradError
from postgrad.evaluation.statistics import mean_interval, verdict
from postgrad.jobs import side_by_side
from postgrad.training.files import write_whole


def reproduce(
    slug: str,
    *,
    seeds: int = 3,
    quick: bool = False,
    output: Path | None = None,
    jobs: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Run the claim of `slug` and return its result (also written to `output/result.json`).

    Finished arms are kept in `output` and not run again, so an interrupted call continues. Arms
    run in `jobs` processes (default: one a core) of one thread each, which makes their numbers
    independent of how many run at once.
    """
    claim = load_claim(slug)
    output = output or Path("runs/reproduce") / (f"{slug}-quick" if quick else slug)
    output.mkdir(parents=True, exist_ok=True)
    wanted = [(arm, seed) for seed in range(seeds) for arm in claim.arms]
    missing = [pair for pair in wanted if not _kept(output, *pair).is_file()]
    say(f"{claim.slug}: {len(wanted)} runs, {len(wanted) - len(missing)} already there")
    workers = min(jobs or os.cpu_count() or 1, max(1, len(missing)))
    calls = {(arm, seed): (slug, arm, seed, quick) for arm, seed in missing}
    for (arm, seed), outcome in side_by_side(_one, calls, workers):
        write_whole(_kept(output, arm, seed), json.dumps(outcome))
        say(f"  {arm}, seed {seed}: {claim.metric} {outcome['values'][claim.metric]:.4g}")
    found = {pair: json.loads(_kept(output, *pair).read_text(encoding="utf-8")) for pair in wanted}
    result = summarise(claim, found, seeds, quick)
    (output / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def summarise(
    claim: Claim, found: dict[tuple[str, int], dict[str, Any]], seeds: int, quick: bool
) -> dict[str, Any]:
    """The result object: both sides with intervals, the verdict, every arm's numbers and curves."""

    def values(arm: str, name: str) -> list[float]:
        return [found[arm, seed]["values"][name] for seed in range(seeds)]

    def compared(sides: Claim | Finding) -> dict[str, Any]:
        """Both sides with their intervals, and the verdict."""
        method, baseline = (values(arm, sides.metric) for arm in (sides.method, sides.baseline))
        holds = verdict(method, baseline, sides.higher_is_better)
        return {
            "metric": sides.metric,
            "higher_is_better": sides.higher_is_better,
            "method": {"name": sides.method, **asdict(mean_interval(method))},
            "baseline": {"name": sides.baseline, **asdict(mean_interval(baseline))},
            "holds": "quick run, not decided" if quick else holds,
        }

    return {
        "slug": claim.slug,
        "claim": claim.statement,
        "task": claim.task,
        **compared(claim),
        "seeds": seeds,
        "seconds": round(sum(outcome["seconds"] for outcome in found.values()), 1),
        "findings": [
            {"statement": finding.statement, **compared(finding)} for finding in claim.findings
        ],
        "notes": claim.notes,
        "arms": {
            arm: {name: values(arm, name) for name in found[arm, 0]["values"]} for arm in claim.arms
        },
        "curves": {
            arm: [found[arm, seed].get("curves", {}) for seed in range(seeds)] for arm in claim.arms
        },
        "versions": {
            "python": platform.python_version(),
            "postgrad": __version__,
            **{name: version(name) for name in ("torch", "transformers", "numpy")},
        },
    }


def save_result(result: dict[str, Any], path: Path) -> None:
    """Record a result, its curves thinned to at most 60 points, as the documentation shows it."""
    curves = {
        arm: [
            {name: points[:: max(1, -(-len(points) // 60))] for name, points in seed.items()}
            for seed in seeds
        ]
        for arm, seeds in result["curves"].items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_compact({**result, "curves": curves}) + "\n", encoding="utf-8")


def _compact(result: dict[str, Any]) -> str:
    """Indented JSON with lists of numbers on one line and five significant digits."""
    rounded = json.loads(json.dumps(result), parse_float=lambda text: float(f"{float(text):.5g}"))
    text = json.dumps(rounded, indent=1, ensure_ascii=False)
    return re.sub(r"\[[^\[\]{}\"]*\]", lambda match: " ".join(match.group().split()), text)


def _kept(output: Path, arm: str, seed: int) -> Path:
    name = "".join(c if c.isalnum() or c in "-_." else "-" for c in arm)
    return output / f"{name}-seed{seed}.json"


def _one(slug: str, arm: str, seed: int, quick: bool) -> dict[str, Any]:
    started = time.perf_counter()
    outcome: Outcome = load_claim(slug).run(arm, seed, quick)
    for name, value in outcome.values.items():
        if not math.isfinite(value):
            raise PostgradError(f"{slug}, {arm}, seed {seed}: {name} is {value}")
    return {**asdict(outcome), "seconds": time.perf_counter() - started}
