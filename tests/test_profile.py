"""Where time and memory go: stretches that add up, the profile's files, and the report of it."""

import gzip
import json
import time

import pytest
import torch

import postgrad
from postgrad import api, timing
from postgrad.config import LoopSettings
from postgrad.errors import PostgradError
from postgrad.memory import forget_peak_memory, peak_memory
from postgrad.methods.base import Place
from postgrad.timing import observed, timed
from postgrad.training.console import Silent
from postgrad.training.loop import Loop
from postgrad.training.profile import Step, costs, operators
from postgrad.training.record import RunFolder, read_rows
from regression import Regression, RegressionSettings

TINY = {"model": "tiny", "batch_size": 2, "eval_size": 4, "threads": 1, "log": []}


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """On a busy machine any step may take long."""
    monkeypatch.setattr("postgrad.training.profile.LONG_TRACE", 1e9)


def compute(seconds: float) -> None:
    """Keep the processor busy."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        torch.ones(200_000).sum()  # large, so that a trace has few calls


class Busy(Regression):
    """Spends known times in its parts; a reward lies within collecting, a scoring in updating."""

    def collect(self, step):
        compute(0.02)
        with timed("reward"):
            compute(0.03)
        return super().collect(step)

    def update(self, batch, optimise):
        with timed("scoring"):
            compute(0.02)
        return super().update(batch, optimise)

    def evaluate(self):
        with timed("reward"):
            compute(0.05)
        return super().evaluate()


class Listener(Silent):
    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)


def run(path, *, watcher=None, **settings):
    method = Busy(RegressionSettings(), Place())
    folder = RunFolder(path)
    folder.create({"method": "regression"}, {})
    loop = Loop(method, LoopSettings(learning_rate=0.1, **settings), folder, watcher or Silent())
    loop.run({})


def profile_of(path):
    return json.loads((path / "profile" / "profile.json").read_text())


def test_a_stretch_has_not_the_time_of_those_within_it():
    timing.take()
    started = time.perf_counter()
    with timed("outer"):
        compute(0.02)
        with timed("inner"):
            compute(0.03)
            with timed("outer"):
                compute(0.01)
        with timed("inner"):
            compute(0.01)
    whole = time.perf_counter() - started
    spent = timing.take()
    assert 0.07 <= sum(spent.values()) <= whole
    assert spent["outer"] >= 0.03
    assert spent["inner"] >= 0.04
    assert timing.take() == {}


def test_a_stretch_that_fails_is_counted_and_closed():
    timing.take()
    with pytest.raises(ZeroDivisionError), timed("outer"), timed("inner"):
        compute(0.01 / 0)
    with timed("next"):
        compute(0.01)
    assert list(timing.take()) == ["inner", "outer", "next"]


def test_an_observer_labels_stretches_and_waits_at_both_ends():
    seen = []

    class Label:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            seen.append(self.name)

        def __exit__(self, *_):
            seen.append(f"end of {self.name}")

    with observed(lambda: seen.append("wait"), Label), timed("rollout"):
        seen.append("work")
    with timed("reward"):
        pass
    assert seen == ["rollout", "wait", "work", "wait", "end of rollout"]


def test_the_stretches_of_a_step_add_up_to_it(tmp_path):
    run(tmp_path / "run", steps=3, save_every=1, evaluate_every=1)
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    rests = []
    for row in rows:
        seconds = {k.removeprefix("time/"): v for k, v in row.items() if k.startswith("time/")}
        whole = seconds.pop("step")
        assert set(seconds) == {
            "data", "reward", "scoring", "loss", "backward", "optimiser", "update",
        }  # fmt: skip
        assert sum(seconds.values()) <= whole
        assert seconds["reward"] >= 0.03
        assert seconds["data"] >= 0.02
        rests.append(1 - sum(seconds.values()) / whole)
    assert min(rests) < 0.1
    assert not (tmp_path / "run" / "profile").exists()


def test_a_profile_has_costs_memory_operators_and_a_trace(tmp_path):
    listener = Listener()
    path = tmp_path / "run"
    run(path, watcher=listener, steps=6, profile=True, save_every=2)
    found = profile_of(path)
    assert found["steps"] == {"measured": [5, 6], "traced": [2, 3, 4]}
    assert found["step"]["tokens"] == {"sampled": 0, "trained": 32}
    parts = found["stretches"].values()
    assert sum(part["share"] for part in parts) == pytest.approx(1)
    assert found["step"]["microseconds_per_token"] == {
        "sampled": None,
        "trained": pytest.approx(1e6 * sum(part["total"] for part in parts) / 64),
    }
    assert found["stretches"]["reward"]["seconds"] >= 0.03
    # an evaluation is one stretch, with the reward within it
    assert found["between_steps"]["evaluate"]["times"] == 2
    assert found["between_steps"]["evaluate"]["seconds"] >= 0.1
    assert found["between_steps"]["checkpoint"]["times"] == 4
    assert 2**24 < found["peak_memory"]["process"] < 2**40
    assert "aten::sum" in {row["name"] for row in found["operators"]}
    assert "aten::sum" in (path / "profile" / "operators.txt").read_text()

    events = json.loads(gzip.decompress((path / "profile" / "trace.json.gz").read_bytes()))
    calls = [event["name"] for event in events["traceEvents"] if event.get("ph") == "X"]
    assert [calls.count(name) for name in ("data", "reward", "backward")] == [3, 3, 3]
    assert len(listener.lines) >= 3
    assert "reward" in listener.lines[-3]
    assert "µs per trained token, peak memory" in listener.lines[-2]
    assert "trace.json.gz" in listener.lines[-1]


@pytest.mark.parametrize(("steps", "traced"), [(1, [1]), (3, [2, 3])])
def test_a_short_run_is_traced_as_far_as_it_goes(tmp_path, steps, traced):
    run(tmp_path / "run", steps=steps, profile=True)
    assert profile_of(tmp_path / "run")["steps"] == {"measured": traced, "traced": traced}


def test_a_long_step_ends_the_trace(tmp_path, monkeypatch):
    monkeypatch.setattr("postgrad.training.profile.LONG_TRACE", 0.01)
    run(tmp_path / "run", steps=4, profile=True)
    assert profile_of(tmp_path / "run")["steps"] == {"measured": [3, 4], "traced": [2]}


def test_a_run_that_fails_leaves_its_profile(tmp_path):
    method = Busy(RegressionSettings(bad_step=2), Place())
    folder = RunFolder(tmp_path / "run")
    folder.create({"method": "regression"}, {})
    settings = LoopSettings(steps=5, learning_rate=0.1, profile=True)
    with pytest.raises(PostgradError, match="step 3: the loss is inf"):
        Loop(method, settings, folder, Silent()).run({})
    assert profile_of(tmp_path / "run")["steps"]["traced"] == [2]


def test_the_report_of_a_language_run_shows_its_profile_also_after_a_resume(tmp_path):
    small = {**TINY, "rollout": {"samples": 2, "max_new_tokens": 4}}
    path = tmp_path / "run"
    postgrad.train("grpo", output=path, steps=2, **small)
    assert not (path / "profile").exists()
    assert 'id="profile"' not in (path / "report.html").read_text()
    # the run's end was at step 2, so nothing is left to measure
    api.resume(path, profile=True)
    assert not (path / "profile").exists()
    with pytest.raises(PostgradError, match="steps: 2 then, 5 now"):
        api.resume(path, profile=True, steps=5)
    api.resume(path, profile=True, steps=5, allow_changes=True)
    found = profile_of(path)
    assert found["steps"] == {"measured": [4, 5], "traced": [4, 5]}
    assert found["step"]["tokens"]["sampled"] > 0
    assert found["stretches"]["rollout"]["microseconds_per_token"] > 0
    page = (path / "report.html").read_text()
    section = page.partition('<section id="profile">')[2].partition("</section>")[0]
    for shown in ("rollout", "Microseconds a token", "Peak memory", "aten::", "trace.json.gz"):
        assert shown in section


def step(number, seconds, *, tokens=100, trained=100, traced=False):
    return Step(number, seconds, tokens, trained, traced)


def test_costs_are_of_steps_after_the_first_that_were_not_traced():
    found = costs(
        [
            step(1, {"step": 50.0}),
            step(2, {"rollout": 9.0, "step": 10.0}, traced=True),
            step(3, {"rollout": 2.0, "loss": 1.0, "step": 4.0}, trained=200),
            step(4, {"rollout": 4.0, "scoring": 1.0, "step": 6.0}, trained=200),
        ]
    )
    assert found["steps"] == {"measured": [3, 4], "traced": [2]}
    assert found["step"] == {
        "seconds": 5.0,
        "tokens": {"sampled": 100, "trained": 200},
        "microseconds_per_token": {"sampled": 50_000, "trained": 25_000},
    }
    parts = found["stretches"]
    assert parts["rollout"] == {
        "seconds": 3.0, "total": 6.0, "share": 0.6, "microseconds_per_token": 30_000,
    }  # fmt: skip
    assert parts["loss"]["microseconds_per_token"] == 2500
    assert parts["scoring"]["seconds"] == 0.5
    assert parts["other"]["total"] == 2.0


def event(category, name, start, duration, thread=1, **details):
    return {
        "ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, "tid": thread,
        "args": details,
    }  # fmt: skip


def test_the_time_of_an_operator_is_its_own():
    rows = operators(
        [
            event("user_annotation", "loss", 0.0, 100.0),
            event("cpu_op", "linear", 10.0, 60.0),
            event("cpu_op", "mm", 20.0, 40.0),
            event("cpu_op", "mm", 70.0, 10.0),
            event("cpu_op", "mm", 15.0, 20.0, thread=2),
            {"ph": "M", "name": "process_name"},
        ]
    )
    assert [(row["name"], round(1e6 * row["seconds"]), row["calls"]) for row in rows] == [
        ("mm", 70, 3), ("loss (outside operators)", 30, 1), ("linear", 20, 1),
    ]  # fmt: skip
    assert rows[0]["share"] == pytest.approx(70 / 120)


def test_the_time_of_an_operator_on_a_gpu_is_that_of_its_kernels():
    rows = operators(
        [
            event("cpu_op", "mm", 0.0, 500.0, **{"External id": 7}),
            event("gpu_user_annotation", "loss", 0.0, 500.0),
            event("kernel", "gemm", 10.0, 30.0, **{"External id": 7}),
            event("kernel", "reduce", 40.0, 20.0, **{"External id": 7}),
            event("gpu_memcpy", "copy to host", 60.0, 5.0),
        ]
    )
    assert [(row["name"], round(1e6 * row["seconds"]), row["calls"]) for row in rows] == [
        ("mm", 50, 2), ("copy to host", 5, 1),
    ]  # fmt: skip


def test_the_peak_of_memory_is_measured_and_begins_anew():
    forget_peak_memory()
    before = peak_memory()
    held = torch.ones(2**25)  # 128 MiB
    after = peak_memory()
    assert held.sum() == 2**25
    assert after - before > 100 * 2**20
