import json
import os
import resource
import signal

import numpy
import pytest
import torch
from safetensors.torch import load_file

from postgrad.config import LoopSettings
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.seeding import derive, seed_everything
from postgrad.training.checkpoint import checkpoints, load_latest, save_checkpoint
from postgrad.training.console import Silent
from postgrad.training.loop import EarlyStop, Loop, pick_device, writable
from postgrad.training.optimise import learning_rate_factor
from postgrad.training.record import RunFolder, read_rows
from postgrad.training.tree import flatten, unflatten
from regression import Regression, RegressionSettings


class Listener(Silent):
    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)


def make(path, settings, config=None, watcher=None):
    seed_everything(settings.seed)
    method = Regression(config or RegressionSettings(), Place(settings.seed))
    seed_everything(settings.seed)
    folder = RunFolder(path)
    if not path.exists():
        folder.create({"method": "regression"}, {})
    loop = Loop(method, settings, folder, watcher or Silent())
    return loop


def run(path, settings, **more):
    loop = make(path, settings, **more)
    return loop, loop.run({})


def resumed(path, settings, **more):
    loop = make(path, settings, **more)
    loop.restore()
    return loop, loop.run({})


def untimed(path):
    rows = read_rows(path / "metrics.jsonl")
    timed = ("time/", "throughput/")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows]


def test_it_learns_and_leaves_metrics_samples_and_checkpoints(tmp_path):
    settings = LoopSettings(steps=200, learning_rate=0.1, evaluate_every=50, save_every=50)
    loop, finished = run(tmp_path / "run", settings)
    assert finished.evaluation["distance"] < 0.05
    rows = untimed(tmp_path / "run")
    assert [row["step"] for row in rows if "evaluation/distance" in row] == [0, 50, 100, 150, 200]
    assert [p.name for p in checkpoints(tmp_path / "run" / "checkpoints")] == [
        "step-00000150",
        "step-00000200",
    ]
    samples = read_rows(tmp_path / "run" / "samples.jsonl")
    assert [row["step"] for row in samples][:3] == [1, 10, 20]
    assert loop.method.seen == 200 * 16


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    settings = LoopSettings(steps=12, learning_rate=0.1, save_every=5, schedule="cosine")
    whole, _ = run(tmp_path / "whole", settings)

    first = make(tmp_path / "parts", settings)
    first.folder.open({})
    first._evaluate()
    for _ in range(7):
        first._one_step()
        if first._due(5):
            first.save()
    del first  # two steps after the checkpoint of step 5, everything in memory is lost
    second, _ = resumed(tmp_path / "parts", settings)

    assert untimed(tmp_path / "whole") == untimed(tmp_path / "parts")
    torch.testing.assert_close(
        whole.method.network.state_dict(), second.method.network.state_dict(), rtol=0, atol=0
    )
    assert whole.method.seen == second.method.seen


def test_an_evaluation_leaves_no_trace_in_the_random_states(tmp_path):
    often = LoopSettings(steps=6, learning_rate=0.1, evaluate_every=1)
    never = LoopSettings(steps=6, learning_rate=0.1)
    one, _ = run(tmp_path / "often", often)
    other, _ = run(tmp_path / "never", never)
    assert torch.equal(one.method.network.weight, other.method.network.weight)


def test_a_non_finite_loss_stops_and_keeps_what_caused_it(tmp_path):
    settings = LoopSettings(steps=5, learning_rate=0.1, save_every=1)
    loop = make(tmp_path / "run", settings, RegressionSettings(bad_step=2))
    with pytest.raises(PostgradError, match=r"step 3: the loss is inf") as caught:
        loop.run({})
    where = tmp_path / "run" / "failure" / "step-00000003"
    assert str(where) in str(caught.value)
    assert load_file(where / "batch.safetensors")["y"].isinf().any()
    assert json.loads((where / "samples.json").read_text())[0]["x"]
    assert loop.method.network.weight.isfinite().all()
    assert checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "step-00000002"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(tmp_path, number):
    class Interrupting(Silent):
        def step(self, step, metrics, seconds):
            if step == 3:
                os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    settings = LoopSettings(steps=10, learning_rate=0.1)
    _, finished = run(tmp_path / "run", settings, watcher=Interrupting())
    assert finished.interrupted
    assert finished.step in (3, 4)
    assert load_latest(tmp_path / "run" / "checkpoints", print)[0] == finished.step
    assert signal.getsignal(number) is before

    run(tmp_path / "whole", settings)
    _, after = resumed(tmp_path / "run", settings)
    assert after.step == 10
    assert untimed(tmp_path / "run") == untimed(tmp_path / "whole")


def test_an_early_stop_after_patience_without_improvement():
    stop = EarlyStop(LoopSettings(stop_metric="m", stop_patience=2))
    assert [stop.reached({"m": v}) for v in (1, 2, 1.5, 2.0)] == [False, False, False, True]
    lower = EarlyStop(LoopSettings(stop_metric="m", stop_patience=1, stop_higher_is_better=False))
    assert [lower.reached({"m": v}) for v in (2, 1, 1.5)] == [False, False, True]
    with pytest.raises(PostgradError, match="'m' is not evaluated: there is other"):
        stop.reached({"other": 1.0})


def test_the_loop_stops_early(tmp_path):
    settings = LoopSettings(
        steps=50, learning_rate=1e-12, evaluate_every=1, stop_metric="distance", stop_patience=3,
        stop_higher_is_better=True,
    )  # fmt: skip
    listener = Listener()
    _, finished = run(tmp_path / "run", settings, watcher=listener)
    assert finished.step < 50
    assert any("stopping early" in line for line in listener.lines)


def test_a_damaged_checkpoint_is_passed_over_and_said(tmp_path):
    settings = LoopSettings(steps=4, learning_rate=0.1, save_every=2)
    run(tmp_path / "run", settings)
    newest = checkpoints(tmp_path / "run" / "checkpoints")[-1] / "state.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    listener = Listener()
    loop = make(tmp_path / "run", settings, watcher=listener)
    loop.restore()
    assert loop.step == 2
    assert "does not match its checksum" in listener.lines[0]


def test_an_unfinished_checkpoint_does_not_count(tmp_path):
    save_checkpoint(tmp_path, 1, {"a": 1}, keep=2)
    (tmp_path / "step-00000002").mkdir()
    (tmp_path / ".writing-00000003-1").mkdir()
    assert load_latest(tmp_path, print) == (1, {"a": 1})
    save_checkpoint(tmp_path, 4, {"a": 2}, keep=2)
    assert not list(tmp_path.glob(".writing-*"))


@pytest.fixture
def full_disk():
    """Files cannot grow beyond 4 kB: the system refuses the write, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_stops_and_leaves_the_last_checkpoint_good(tmp_path, full_disk):
    save_checkpoint(tmp_path, 1, {"a": torch.ones(3)}, keep=2)
    with pytest.raises(PostgradError, match=r"cannot write .* good checkpoint is .*step-00000001"):
        save_checkpoint(tmp_path, 2, {"a": torch.ones(3000)}, keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert load_latest(tmp_path, print)[0] == 1


def test_a_torn_last_line_is_dropped_and_later_rows_are_cut(tmp_path):
    path = tmp_path / "run"
    folder = RunFolder(path)
    folder.create({"method": "regression"}, {})
    folder.open({})
    for step in (1, 2, 3):
        folder.metrics(step, {"loss": float(step)})
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    folder.open({}, 2, {"metrics.jsonl": 2})
    folder.metrics(3, {"loss": 9.0})
    assert [row["loss"] for row in read_rows(path / "metrics.jsonl")] == [1.0, 2.0, 9.0]


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.create({"method": "regression"}, {})
    with pytest.raises(PostgradError, match="already holds a run"):
        folder.create({"method": "regression"}, {})


def test_an_unwritable_place_is_found_before_any_compute(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PostgradError, match="not writable"):
        writable(tmp_path / "file" / "run")
    writable(tmp_path / "new" / "run")


def test_devices():
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(PostgradError, match="expected auto, cpu or cuda"):
        pick_device("gpu")


def test_schedules():
    constant = LoopSettings(steps=10, warmup_steps=4)
    assert [learning_rate_factor(constant, s) for s in range(6)] == [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]
    linear = LoopSettings(steps=4, schedule="linear")
    assert [learning_rate_factor(linear, s) for s in range(4)] == [1.0, 0.75, 0.5, 0.25]
    cosine = LoopSettings(steps=4, schedule="cosine")
    assert learning_rate_factor(cosine, 2) == pytest.approx(0.5)


def test_state_trees_survive_the_round_trip():
    tree = {
        "t": torch.arange(3),
        1: [1, 2.5, None, True, "x"],
        "n": numpy.arange(4.0),
        "nested": ({"a": torch.zeros(2, dtype=torch.bfloat16)}, -float("inf")),
        "empty": {},
    }
    structure, tensors = flatten(tree)
    again = unflatten(json.loads(json.dumps(structure)), tensors)
    assert again["t"].equal(tree["t"])
    assert again[1] == tree[1]
    assert (again["n"] == tree["n"]).all()
    assert again["nested"][0]["a"].dtype == torch.bfloat16
    assert again["nested"][1] == -float("inf")
    assert again["empty"] == {}
    with pytest.raises(TypeError, match=r"root\.x holds a object"):
        flatten({"x": object()})


def test_derived_seeds_differ_by_every_name():
    assert len({derive(0), derive(1), derive(0, "a"), derive(0, "a", 1), derive(0, "a1")}) == 5
    assert derive(3, "x", 2) == derive(3, "x", 2)
