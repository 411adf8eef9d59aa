"""Where the time and memory of a run's steps go: what `profile=true` measures and writes."""

import gzip
import json
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function

from postgrad.errors import PostgradError
from postgrad.memory import forget_peak_memory, peak_memory
from postgrad.timing import observed
from postgrad.training.record import OPERATORS, PROFILE, TRACE

TRACED_STEPS = 3
# a trace has up to half a million events a second, and takes a kilobyte of memory for each
LONG_TRACE = 10.0
LISTED_OPERATORS = 30
# the stretches of an optimiser step: their work is on the tokens that are trained on
OPTIMISING = ("loss", "backward", "optimiser", "update")


@dataclass(frozen=True)
class Step:
    """What a step took: seconds by stretch and as `step`, tokens of its batch, tokens trained on.

    With several passes over a batch its tokens are trained on several times, and count as often.
    """

    number: int
    seconds: dict[str, float]
    tokens: int
    trained: int
    traced: bool


class Profiler:
    """Measures a run while it is open as a context, and writes `profile/` of the run folder.

    On a GPU every stretch waits for its work to end, so the parts of a step do not overlap and the
    run is a little slower. The second to the fourth step of the process are traced (the first
    warms up), fewer if they are long; a run of a single step has that one traced.
    """

    def __init__(self, folder: Path, device: torch.device):
        self._folder = folder
        self._device = device
        self._steps: list[Step] = []
        self._between: dict[str, list[float]] = {}
        self._operators: list[dict[str, Any]] = []
        self._trace: torch.profiler.profile | None = None
        self._trace_began = 0.0
        self._peak = 0
        self._summary: dict[str, Any] = {}
        self._watching = ExitStack()

    def __enter__(self) -> "Profiler":
        self._watching.enter_context(observed(self._wait, record_function))
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._watching.close()
        if self._trace:
            self._end_trace(self._trace)
        if self._steps:
            self._summary = self._summarise()
            text = json.dumps(self._summary, indent=1) + "\n"
            self._write(PROFILE, text.encode())

    def begin_step(self, *, last: bool) -> None:
        """A step begins; `last` if no other is to follow."""
        if len(self._steps) == 1 or (last and not self._steps):
            activities = [ProfilerActivity.CPU]
            if self._device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._trace = torch.profiler.profile(activities=activities)
            self._trace.start()
            self._trace_began = time.perf_counter()

    def end_step(self, number: int, seconds: dict[str, float], tokens: int, trained: int) -> None:
        """Step `number` took `seconds`, collected `tokens` and learnt from `trained` of them."""
        traced = self._trace is not None
        self._steps.append(Step(number, seconds, tokens, trained, traced))
        if self._trace and (
            sum(step.traced for step in self._steps) == TRACED_STEPS
            or time.perf_counter() - self._trace_began > LONG_TRACE
        ):
            self._end_trace(self._trace)

    def between_steps(self, name: str, seconds: float) -> None:
        """Something that is no part of a step (an evaluation, a checkpoint) took `seconds`."""
        self._between.setdefault(name, []).append(seconds)

    def lines(self) -> list[str]:
        """The summary in a few lines for people; none if no step was made."""
        if not self._summary:
            return []
        step, stretches = self._summary["step"], self._summary["stretches"]
        parts = sorted(stretches.items(), key=lambda part: -part[1]["share"])
        shares = [
            f"{name} {100 * part['share']:.0f} %" for name, part in parts if part["share"] > 0.005
        ]
        prices = [
            f"{cost:.3g} µs per {kind} token"
            for kind, cost in step["microseconds_per_token"].items()
            if cost is not None
        ]
        peaks = [
            f"{size / 2**30:.2f} GiB ({where})"
            for where, size in self._summary["peak_memory"].items()
        ]
        return [
            f"a step takes {step['seconds']:.3g} s: {', '.join(shares)}",
            ", ".join([*prices, f"peak memory {' and '.join(peaks)}"]),
            f"trace: {self._folder / TRACE} (open it at https://ui.perfetto.dev)",
        ]

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _end_trace(self, trace: torch.profiler.profile) -> None:
        """Write the trace and the operators; the memory that this takes is left out of the peak."""
        self._trace = None
        self._peak = peak_memory()
        trace.stop()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            trace.export_chrome_trace(str(path))
            text = path.read_bytes()
        self._write(TRACE, gzip.compress(text, compresslevel=5))
        self._operators = operators(json.loads(text)["traceEvents"])
        self._write(OPERATORS, _table(self._operators[:LISTED_OPERATORS]).encode())
        del trace, text
        forget_peak_memory()

    def _summarise(self) -> dict[str, Any]:
        peaks = {"process": max(self._peak, peak_memory())}
        name = "cpu"
        if self._device.type == "cuda":
            peaks["GPU"] = torch.cuda.max_memory_allocated(self._device)
            name = torch.cuda.get_device_name(self._device)
        return {
            "device": name,
            "threads": torch.get_num_threads(),
            **costs(self._steps),
            "between_steps": {
                name: {"times": len(seconds), "seconds": sum(seconds)}
                for name, seconds in self._between.items()
            },
            "peak_memory": peaks,
            "operators": self._operators[:LISTED_OPERATORS],
        }

    def _write(self, name: str, content: bytes) -> None:
        path = self._folder / name
        try:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        except OSError as error:
            raise PostgradError(f"cannot write {path}: {error.strerror}") from error


def costs(steps: Sequence[Step]) -> dict[str, Any]:
    """What the steps after the first took: in all, by stretch, and for each token.

    Traced steps are slower, so they count only where there are no others. `other` is what lies in
    no stretch. Seconds of a step are medians; shares and microseconds per token are of sums. The
    tokens of a stretch are those of the batch, in optimiser steps those trained on.
    """
    after_first = steps[1:] or steps
    measured = [step for step in after_first if not step.traced] or after_first
    whole = sum(step.seconds["step"] for step in measured)
    names = dict.fromkeys(name for step in measured for name in step.seconds if name != "step")
    seconds = {name: [step.seconds.get(name, 0.0) for step in measured] for name in names}
    seconds["other"] = [
        max(0.0, step.seconds["step"] - sum(named))
        for step, named in zip(measured, zip(*seconds.values(), strict=True), strict=True)
    ]
    collected = sum(step.tokens for step in measured)
    trained = sum(step.trained for step in measured)
    sampled = collected if "rollout" in names else 0
    return {
        "steps": {
            "measured": [step.number for step in measured],
            "traced": [step.number for step in steps if step.traced],
        },
        "step": {
            "seconds": statistics.median(step.seconds["step"] for step in measured),
            "tokens": {
                "sampled": round(sampled / len(measured)),
                "trained": round(trained / len(measured)),
            },
            "microseconds_per_token": {
                "sampled": _microseconds(whole, sampled),
                "trained": _microseconds(whole, trained),
            },
        },
        "stretches": {
            name: {
                "seconds": statistics.median(values),
                "total": sum(values),
                "share": sum(values) / whole,
                "microseconds_per_token": _microseconds(
                    sum(values), trained if name in OPTIMISING else collected
                ),
            }
            for name, values in seconds.items()
        },
    }


def _microseconds(seconds: float, tokens: int) -> float | None:
    return 1e6 * seconds / tokens if tokens else None


def operators(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Operators of a Chrome trace by the seconds that they took themselves, longest first.

    On a CPU that is an operator's time without the operators within it; a stretch of ours has what
    lies outside any operator, so mostly Python. Where a GPU computed, it is the time of the kernels
    that the operator started.
    """
    complete = [event for event in events if event.get("ph") == "X"]
    kernels = [e for e in complete if e["cat"] in ("kernel", "gpu_memcpy", "gpu_memset")]
    spent: dict[str, list[float]] = {}
    if kernels:
        started_by = {
            e["args"].get("External id"): e["name"] for e in complete if e["cat"] == "cpu_op"
        }
        for event in kernels:
            name = started_by.get(event["args"].get("External id"), event["name"])
            spent.setdefault(name, []).append(event["dur"])
    else:
        for name, microseconds in _self_times(complete):
            spent.setdefault(name, []).append(microseconds)
    whole = sum(map(sum, spent.values()))
    rows = [
        {
            "name": name,
            "seconds": sum(each) / 1e6,
            "share": sum(each) / whole if whole else 0.0,
            "calls": len(each),
        }
        for name, each in spent.items()
    ]
    return sorted(rows, key=lambda row: -row["seconds"])


def _self_times(complete: Iterable[dict[str, Any]]) -> list[tuple[str, float]]:
    """Name and microseconds of every event on the CPU, without the events within it."""
    threads: dict[Any, list[dict[str, Any]]] = {}
    for event in complete:
        if event["cat"] in ("cpu_op", "user_annotation"):
            threads.setdefault(event["tid"], []).append(event)
    found = []
    for of_thread in threads.values():
        of_thread.sort(key=lambda event: (event["ts"], -event["dur"]))
        names: list[str] = []
        own: list[float] = []
        open_now: list[tuple[int, float]] = []  # which event, when it ends
        for position, event in enumerate(of_thread):
            while open_now and open_now[-1][1] <= event["ts"]:
                open_now.pop()
            if open_now:
                own[open_now[-1][0]] -= event["dur"]
            outside = " (outside operators)" if event["cat"] == "user_annotation" else ""
            names.append(event["name"] + outside)
            own.append(event["dur"])
            open_now.append((position, event["ts"] + event["dur"]))
        found += list(zip(names, own, strict=True))
    return found


def _table(rows: Iterable[dict[str, Any]]) -> str:
    lines = [f"{'self seconds':>12} {'share':>7} {'calls':>9}  operator"]
    lines += [
        f"{row['seconds']:12.4f} {100 * row['share']:5.1f} % {row['calls']:9d}  {row['name']}"
        for row in rows
    ]
    return "\n".join(lines) + "\n"
