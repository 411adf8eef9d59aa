"""Several methods on equal terms: the same data, samples and seeds; one table and one page."""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from postgrad import api
from postgrad.catalogue import method_class
from postgrad.config import (
    LoopSettings,
    dotted_keys,
    flat,
    merge,
    parse_overrides,
    resolve,
    unknown_key,
)
from postgrad.errors import PostgradError
from postgrad.evaluation.statistics import mean_interval
from postgrad.jobs import side_by_side
from postgrad.reports.compare import write_compare_report
from postgrad.tasks import Examples, load
from postgrad.training.record import METRICS, fresh_folder, is_run, read_rows


@dataclass(frozen=True)
class Contender:
    """A method, perhaps with settings of its own: `lite-ppo:mask.clip_high=0.28,aggregation=…`."""

    name: str

    @property
    def method(self) -> str:
        return self.name.partition(":")[0]

    @property
    def settings(self) -> dict[str, Any]:
        own = self.name.partition(":")[2]
        return parse_overrides(own.split(",")) if own else {}

    @property
    def folder(self) -> str:
        return re.sub(r"[^\w.=-]+", "-", self.name)


def compare(
    methods: Sequence[str],
    *,
    budget: int,
    seeds: int = 1,
    output: Path | None = None,
    jobs: int = 1,
    say: Callable[[str], None] = lambda line: None,
    **settings: Any,
) -> tuple[str, Path]:
    """Train every method for `budget` samples under every seed; return a table and a page.

    A sample is what a method consumes: a row of data, or a completion where it samples. A method
    may be named several times with settings of its own, `grpo:mask.clip_high=0.28`; `settings` are
    those of all that have them. Runs that are complete in `output` are kept, unfinished ones
    continue. With `jobs` above 1 so many are under way at once, each in a process of one thread;
    settings then hold names alone and no objects.
    """
    if len(set(methods)) < len(methods):
        raise PostgradError("a method is named twice")
    contenders = [Contender(name) for name in methods]
    settings = _with_common_reward([each.method for each in contenders], settings)
    common = _taken(contenders, settings)
    costs = {each: _samples_a_step(each, own) for each, own in common.items()}
    for each, cost in costs.items():
        if budget < cost:
            raise PostgradError(f"budget: {each.name} needs at least {cost} samples for one step")
    if output is None:
        output = fresh_folder(Path("runs") / f"compare-{time.strftime('%Y%m%d-%H%M%S')}")
    calls: list[tuple[str, Path, dict[str, Any]]] = []
    runs: list[dict[str, Any]] = []
    for seed in range(seeds):
        for each, cost in costs.items():
            folder, steps = output / f"{each.folder}-seed{seed}", budget // cost
            own = {"steps": steps, "seed": seed, "evaluate_every": max(1, steps // 5)}
            calls.append((each.method, folder, merge(merge(own, common[each]), each.settings)))
            runs.append({"method": each.name, "seed": seed, "samples": steps * cost})
    _train_all(calls, jobs, say)
    for run, (_, folder, _) in zip(runs, calls, strict=True):
        run["metrics"] = read_rows(folder / METRICS)
    title = f"{', '.join(methods)}: {budget} samples each"
    config = {key: str(value) for key, value in flat(settings).items()}
    page = write_compare_report(runs, output / "report.html", title=title, config=config)
    return _table(methods, runs), page


def _with_common_reward(methods: Sequence[str], settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with a reward that evaluations of all methods measure, if the task brings one.

    Methods that learn from pairs and methods that sample have little else in common.
    """
    data = settings.get("data")
    named: Any = {"name": data} if isinstance(data, str) else data
    measured = all("frontier" in method_class(method).Config.model_fields for method in methods)
    if (
        not measured
        or not isinstance(named, Mapping)
        or not Examples.has_test_split(named["name"])
        or "frontier.reward" in flat(settings)
    ):
        return settings
    task = load(named["name"], split="test", settings=named.get("settings"))
    return merge(settings, {"frontier": {"reward": task.verifier}})


def _taken(
    contenders: Sequence[Contender], settings: dict[str, Any]
) -> dict[Contender, dict[str, Any]]:
    """Of the common settings those that each contender's method has; one that none has is an error.

    A method that learns from demonstrations has no rollouts, so that their settings pass it by.
    """
    kinds = {each: method_class(each.method).Config for each in contenders}
    known = {each: {*kind.model_fields, *LoopSettings.model_fields} for each, kind in kinds.items()}
    for key in settings:
        if not any(key in names for names in known.values()):
            every = {name for kind in kinds.values() for name in dotted_keys(kind)}
            raise unknown_key(key, sorted(every.union(dotted_keys(LoopSettings))))
    return {
        each: {key: value for key, value in settings.items() if key in names}
        for each, names in known.items()
    }


def _samples_a_step(contender: Contender, settings: dict[str, Any]) -> int:
    """What one step consumes: rows of data, times completions a prompt where it samples."""
    kind = method_class(contender.method)
    _, own = resolve(kind.Config, kind.recipe, settings, contender.settings)
    values = flat(own)
    if "batch_size" not in values:
        raise PostgradError(
            f"{contender.name}: cannot count its samples, so it cannot be compared here"
        )
    return int(values["batch_size"]) * int(values.get("rollout.samples", 1))


def _train_all(
    calls: Sequence[tuple[str, Path, dict[str, Any]]], jobs: int, say: Callable[[str], None]
) -> None:
    """Train each (method, folder, settings), `jobs` at a time."""
    if jobs == 1:
        for method, folder, settings in calls:
            say(f"{method}, seed {settings['seed']}: {settings['steps']} steps in {folder}")
            _train(method, folder, settings)
        return
    by_folder = {folder: (method, folder, settings) for method, folder, settings in calls}
    for number, (folder, _) in enumerate(side_by_side(_train, by_folder, jobs), 1):
        say(f"{number} of {len(calls)}: {folder}")


def _train(method: str, folder: Path, settings: dict[str, Any]) -> None:
    """Train in `folder`, or continue what is there; another budget there is an error."""
    settings = merge(settings, {"report": False})
    if is_run(folder):
        run = api.resume(folder, **settings)
    else:
        run = api.train(method, **merge(settings, {"output": str(folder)}))
    if run.finished.interrupted:
        raise PostgradError(
            f"interrupted after step {run.finished.step} of {folder}: the same command with "
            f"--output {folder.parent} continues"
        )


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
    width = max(20, *(len(method) + 1 for method in methods))
    lines = ["method".ljust(width) + "".join(titles)]
    for method in methods:
        cells = []
        for name in shared:
            interval = mean_interval([final[name] for final in finals[method]])
            several = len(finals[method]) > 1
            span = f" [{interval.low:.3g}, {interval.high:.3g}]" if several else ""
            cells.append(f"{interval.mean:.4g}{span}".rjust(26))
        lines.append(method.ljust(width) + "".join(cells))
    return "\n".join(lines)
