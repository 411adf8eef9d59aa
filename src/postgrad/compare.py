"""Several methods on equal terms: the same data, samples and seeds; one table and one page."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from postgrad import api
from postgrad.catalogue import method_class
from postgrad.config import flat, merge, read_yaml, resolve
from postgrad.errors import PostgradError
from postgrad.evaluation.statistics import mean_interval
from postgrad.reports.compare import write_compare_report
from postgrad.training.record import METRICS, is_run, read_rows


def compare(
    methods: Sequence[str],
    *,
    budget: int,
    seeds: int = 1,
    output: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
    **settings: Any,
) -> tuple[str, Path]:
    """Train every method for `budget` samples under every seed; return a table and a page.

    A sample is what a method consumes: a row of data, or a completion where it samples. Runs that
    are complete in `output` are kept, unfinished ones continue.
    """
    output = output or Path("runs") / f"compare-{time.strftime('%Y%m%d-%H%M%S')}"
    if len(set(methods)) < len(methods):
        raise PostgradError("a method is named twice")
    plans = {method: _steps(method, budget, settings) for method in methods}
    runs = []
    for seed in range(seeds):
        for method in methods:
            folder = output / f"{method}-seed{seed}"
            say(f"{method}, seed {seed}: {plans[method]} steps in {folder}")
            steps = plans[method]
            own = {"steps": steps, "seed": seed, "evaluate_every": max(1, steps // 5)}
            _train(method, folder, merge(own, settings))
            rows = read_rows(folder / METRICS)
            runs.append({"method": method, "seed": seed, "metrics": rows})
    title = f"{', '.join(methods)}: {budget} samples each"
    config = {key: str(value) for key, value in flat(settings).items()}
    page = write_compare_report(runs, output / "report.html", title=title, config=config)
    return _table(methods, runs), page


def _steps(method: str, budget: int, settings: dict[str, Any]) -> int:
    """How many steps use up the budget under the method's batch size (and samples a prompt)."""
    kind = method_class(method)
    _, own = resolve(kind.Config, kind.recipe, settings)
    values = flat(own)
    if "batch_size" not in values:
        raise PostgradError(f"{method}: cannot count its samples, so it cannot be compared here")
    a_step = int(values["batch_size"]) * int(values.get("rollout.samples", 1))
    if budget < a_step:
        raise PostgradError(f"budget: {method} needs at least {a_step} samples for one step")
    return budget // a_step


def _train(method: str, folder: Path, settings: dict[str, Any]) -> None:
    if not is_run(folder):
        api.train(method, **merge(settings, {"output": str(folder), "report": False}))
        return
    rows = read_rows(folder / METRICS)
    if not rows or rows[-1]["step"] < read_yaml(folder / "config.yaml")["steps"]:
        api.resume(folder)


def _table(methods: Sequence[str], runs: list[dict[str, Any]]) -> str:
    """Last evaluation of every method, mean over seeds with 95 % intervals."""
    finals: dict[str, list[dict[str, float]]] = {method: [] for method in methods}
    for run in runs:
        evaluated = [row for row in run["metrics"] if any(k.startswith("evaluation/") for k in row)]
        finals[run["method"]].append(evaluated[-1] if evaluated else {})
    shared = [
        name
        for name in finals[methods[0]][0]
        if name.startswith("evaluation/")
        and all(name in final for each in finals.values() for final in each)
    ]
    titles = [name.removeprefix("evaluation/").rjust(26) for name in shared]
    lines = ["method".ljust(20) + "".join(titles)]
    for method in methods:
        cells = []
        for name in shared:
            interval = mean_interval([final[name] for final in finals[method]])
            several = len(finals[method]) > 1
            span = f" [{interval.low:.3g}, {interval.high:.3g}]" if several else ""
            cells.append(f"{interval.mean:.4g}{span}".rjust(26))
        lines.append(method.ljust(20) + "".join(cells))
    return "\n".join(lines)
