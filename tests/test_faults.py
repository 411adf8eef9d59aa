"""What breaks around a run: disks, clocks, machines, files. Nothing is lost, and a line says so."""

import errno
import importlib.util
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from language_runs import SMALL, assert_same_run, final_weights, untimed, write_rows
from postgrad import api
from postgrad.api import resume, train
from postgrad.config import LoopSettings
from postgrad.errors import PostgradError
from postgrad.methods.base import Place
from postgrad.seeding import seed_everything
from postgrad.training.checkpoint import checkpoints, load_latest, save_checkpoint
from postgrad.training.console import Silent
from postgrad.training.loop import Loop
from postgrad.training.record import METRICS, SAMPLES, RunFolder, fresh_folder, read_rows
from regression import Regression, RegressionSettings

SETTINGS = LoopSettings(steps=8, learning_rate=0.1, save_every=3, sample_every=1)


class Listener(Silent):
    def __init__(self, after_step=lambda step: None):
        self.lines = []
        self._after_step = after_step

    def say(self, line):
        self.lines.append(line)

    def step(self, step, metrics, seconds):
        self._after_step(step)


def make(path, settings=SETTINGS, watcher=None, kind=Regression):
    seed_everything(settings.seed)
    method = kind(RegressionSettings(), Place(settings.seed))
    seed_everything(settings.seed)
    folder = RunFolder(path)
    if not path.exists():
        folder.create({"method": "regression"}, {})
    return Loop(method, settings, folder, watcher or Silent())


def finish(path, settings=SETTINGS, kind=Regression):
    loop = make(path, settings, kind=kind)
    loop.restore()
    loop.run({})
    return loop


def assert_same(one, other, loops):
    """Metrics, samples, weights and memory of two runs are the same to the bit."""
    assert untimed(one) == untimed(other)
    assert (one / SAMPLES).read_bytes() == (other / SAMPLES).read_bytes()
    first, second = (loop.method for loop in loops)
    assert torch.equal(first.network.weight, second.network.weight)
    assert first.seen == second.seen


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "run"
    loop = make(path)
    loop.run({})
    return path, loop


# kills while a checkpoint is written


def killed_at(event_number, folder, work):
    """Do `work` in a child that is killed at its n-th look at the folder; True if it was."""
    child = os.fork()
    if child == 0:
        seen = 0

        def watch(event, arguments):
            nonlocal seen
            if any(str(folder) in str(argument) for argument in arguments):
                seen += 1
                if seen == event_number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        try:
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("keep", [1, 2])
def test_a_kill_at_every_stage_of_a_checkpoint(tmp_path, keep, again):
    """Whatever the stage, the newest whole checkpoint is the old one or the new one.

    With `again` a checkpoint of the same step is replaced, as at the end of a run.
    """
    old, new = {"weights": torch.zeros(100)}, {"weights": torch.ones(100)}
    step = 2 if again else 3
    found = []
    for number in range(1, 200):
        folder = tmp_path / f"at-{number}"
        save_checkpoint(folder, 1, {"weights": -torch.ones(100)}, keep)
        save_checkpoint(folder, 2, old, keep)
        killed = killed_at(number, folder, lambda f=folder: save_checkpoint(f, step, new, keep))
        lines = []
        reached, state = load_latest(folder, lines.append)
        assert not lines
        assert (reached, float(state["weights"][0])) in {(2, 0.0), (step, 1.0)}
        found.append(float(state["weights"][0]))
        save_checkpoint(folder, 9, new, keep)
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]
        assert len(checkpoints(folder)) <= keep
        if not killed:
            break
    assert not killed
    assert number > 15  # so many stages were tried
    assert found == sorted(found)
    assert {0.0, 1.0} <= set(found)


# damaged files


@pytest.mark.parametrize("name", ["state.json", "state.safetensors", "manifest.json"])
def test_any_flipped_bit_of_a_checkpoint_is_found(tmp_path, name):
    chance = random.Random(0)
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"a": torch.full((3,), float(step)), "b": step}, keep=2)
    file = checkpoints(tmp_path)[-1] / name
    content = file.read_bytes()
    places = range(8 * len(content)) if len(content) < 400 else range(0, 8 * len(content), 7)
    for place in chance.sample(places, min(len(places), 1000)):
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        file.write_bytes(damaged)
        lines = []
        step, state = load_latest(tmp_path, lines.append)
        assert state["b"] == step == float(state["a"][0])
        if step == 1:
            assert "step-00000002 is damaged" in lines[0]
        else:  # such as a space that became another one
            assert name == "manifest.json"
            assert json.loads(damaged) == json.loads(content)


@pytest.mark.parametrize("name", ["state.json", "state.safetensors", "manifest.json"])
def test_a_truncated_or_missing_file_is_passed_over_and_the_run_ends_the_same(
    tmp_path, name, whole
):
    make(tmp_path / "run").run({})
    for damage in ("half", "empty", "missing"):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        file = checkpoints(tmp_path / "copy" / "checkpoints")[-1] / name
        content = file.read_bytes()
        file.unlink()
        if damage != "missing":
            file.write_bytes(content[: len(content) // 2] if damage == "half" else b"")
        listener = Listener()
        loop = make(tmp_path / "copy", watcher=listener)
        loop.restore()
        assert loop.step == 6
        if (name, damage) != ("manifest.json", "missing"):  # then it does not look like one
            assert "step-00000008 is damaged" in listener.lines[0]
        loop.run({})
        assert_same(tmp_path / "copy", whole[0], (loop, whole[1]))


def test_without_a_whole_checkpoint_it_starts_anew_and_says_so(tmp_path, whole):
    make(tmp_path / "run").run({})
    for path in checkpoints(tmp_path / "run" / "checkpoints"):
        (path / "state.json").write_text("{}")
    listener = Listener()
    loop = make(tmp_path / "run", watcher=listener)
    loop.restore()
    assert listener.lines[-1].endswith("has no whole checkpoint: starting from step 0")
    loop.run({})
    assert_same(tmp_path / "run", whole[0], (loop, whole[1]))


def test_rows_cut_within_a_character_and_damaged_rows(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.create({"method": "regression"}, {})
    folder.open({})
    folder.samples(1, [{"response": "é"}])
    with (tmp_path / "run" / SAMPLES).open("ab") as file:
        file.write('{"response": "é'.encode()[:-1])
    assert len(read_rows(tmp_path / "run" / SAMPLES)) == 1
    (tmp_path / "run" / SAMPLES).write_text('{"a": 1}\n{"b": \n')
    with pytest.raises(PostgradError, match=r"samples.jsonl, row 2: the file is damaged"):
        read_rows(tmp_path / "run" / SAMPLES)


# disks that fill up


def fill(disk):
    """Leave no room at all: whatever is written next fails."""
    with (disk / "filler").open("wb", buffering=0) as file:
        while True:
            try:
                file.write(b"x" * 4096)
            except OSError:  # no space left
                return


@pytest.mark.parametrize("full_at", [1, 2, 4, 5])
def test_a_disk_that_fills_up_stops_the_run_which_then_goes_on(small_disk, whole, full_at):
    path = small_disk / "run"
    fills = Listener(lambda step: fill(small_disk) if step == full_at else None)
    with pytest.raises(PostgradError, match="No space left on device") as caught:
        make(path, watcher=fills).run({})
    saved = full_at // 3 * 3
    assert f"once mended, --resume {path} continues after step {saved}" in str(caught.value)
    assert "\n" not in str(caught.value)
    (small_disk / "filler").unlink()
    assert_same(path, whole[0], (finish(path), whole[1]))


def limited(path, name):
    """From the third step on the file `name` cannot grow any more."""

    def limit(step):
        if step == 3:
            size = (path / name).stat().st_size
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, hard))

    return limit


@pytest.mark.parametrize("name", [METRICS, SAMPLES])
def test_metrics_and_samples_that_cannot_be_written(tmp_path, name, monkeypatch):
    settings = LoopSettings(steps=8, learning_rate=0.1, sample_every=1)
    longer = {"a": 0.5} if name == METRICS else {}  # the longer file meets the limit first
    monkeypatch.setattr(
        Regression,
        "describe_batch",
        lambda self, batch: {f"{'m' * 80}{k}": v for k, v in longer.items()},
    )
    if name == SAMPLES:
        monkeypatch.setattr(Regression, "samples", lambda self, batch: [{"text": "s" * 500}])
    whole = make(tmp_path / "whole", settings)
    whole.run({})
    path = tmp_path / "run"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(
            PostgradError, match=rf"step [34]: cannot write .*{name}: File too large"
        ):
            make(path, settings, Listener(limited(path, name))).run({})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_same(path, tmp_path / "whole", (finish(path, settings), whole))


GRPO = {
    **SMALL,
    "data": {"name": "addition", "settings": {"size": 16}},
    "batch_size": 2,
    "rollout": {"samples": 2, "max_new_tokens": 3},
    "eval_size": 2,
    "steps": 3,
}


def test_a_disk_too_small_for_model_events_or_report(small_disk, tmp_path):
    """Somewhere in a run with everything switched on the disk is full; then there is room."""
    settings = {**GRPO, "log": ["tensorboard"], "report": True}
    train("grpo", output=tmp_path / "whole", **settings)
    path = small_disk / "run"
    with pytest.raises(PostgradError, match=r"No space left|cannot write"):
        train("grpo", output=path, **settings)
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    resume(path)
    assert_same_run(path, tmp_path / "whole")
    assert (path / "report.html").is_file()
    assert not [entry.name for entry in path.iterdir() if entry.name.startswith(".")]


def test_a_model_that_cannot_be_written_is_written_on_resumption(tmp_path, monkeypatch):
    train("grpo", output=tmp_path / "whole", **GRPO)
    real = api.method_class("grpo").save

    def full(self, folder):
        real(self, folder)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(api.method_class("grpo"), "save", full)
    with pytest.raises(PostgradError, match=r"cannot write the final model .*: No space left"):
        train("grpo", output=tmp_path / "run", **GRPO)
    assert not (tmp_path / "run" / "model").exists()
    monkeypatch.undo()
    resume(tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_full_disk_at_the_start_leaves_no_half_run(small_disk):
    fill(small_disk)
    with pytest.raises(PostgradError, match=r"cannot write the run folder .*No space left"):
        train("grpo", output=small_disk / "run", **GRPO)
    (small_disk / "filler").unlink()
    with pytest.raises(PostgradError, match="is not a run folder"):
        resume(small_disk / "run")


# the machine is taken away


class Stuck(Regression):
    """In its fifth step it waits for what never comes, before or after its weights have changed."""

    when = "collect"
    stuck = True

    def _wait(self, step):
        if self.stuck and step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait()

    def collect(self, step):
        batch = super().collect(step)
        self._step = step
        if self.when == "collect":
            self._wait(step)
        return batch

    def update(self, batch, optimise):
        metrics = super().update(batch, optimise)
        if self.when == "update":
            self._wait(self._step)
        return metrics


@pytest.mark.parametrize("when", ["collect", "update"])
@pytest.mark.parametrize("save_every", [1, 3, 0])
def test_a_step_longer_than_the_notice_is_given_up_and_its_start_saved(
    tmp_path, monkeypatch, when, save_every
):
    settings = SETTINGS.model_copy(update={"notice": 0.2, "save_every": save_every})
    monkeypatch.setattr(Stuck, "when", when)
    listener = Listener()
    began = time.monotonic()
    finished = make(tmp_path / "run", settings, listener, kind=Stuck).run({})
    assert time.monotonic() - began < 10
    assert finished.interrupted
    assert finished.cut
    assert finished.step == 4
    assert listener.lines[-1] == "step 5 takes too long: given up, and saved as it began"
    assert load_latest(tmp_path / "run" / "checkpoints", print)[0] == 4

    monkeypatch.setattr(Stuck, "stuck", False)
    loops = [make(tmp_path / "whole", settings, kind=Stuck)]
    loops[0].run({})
    loops.append(finish(tmp_path / "run", settings, kind=Stuck))
    assert_same(tmp_path / "whole", tmp_path / "run", loops)


def test_a_step_shorter_than_the_notice_is_finished(tmp_path, whole):
    settings = SETTINGS.model_copy(update={"notice": 60.0})
    terminate = Listener(lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 4 else None)
    finished = make(tmp_path / "run", settings, terminate).run({})
    assert finished.interrupted
    assert not finished.cut
    assert finished.step in (4, 5)
    assert_same(tmp_path / "run", whole[0], (finish(tmp_path / "run", settings), whole[1]))


class Failing(Regression):
    """Its reward fails in the fifth step, after the step has changed memory and random states."""

    fails = True

    def collect(self, step):
        batch = super().collect(step)
        if self.fails and step == 4:
            raise PostgradError("the reward server is down")
        return batch


def test_an_error_within_a_step_leaves_the_state_before_it(tmp_path, monkeypatch, whole):
    with pytest.raises(PostgradError, match="step 5: the reward server is down; once mended"):
        make(tmp_path / "run", kind=Failing).run({})
    assert load_latest(tmp_path / "run" / "checkpoints", print)[0] == 4
    monkeypatch.setattr(Failing, "fails", False)
    loop = finish(tmp_path / "run", kind=Failing)
    assert_same(tmp_path / "run", whole[0], (loop, whole[1]))


def test_a_large_memory_is_not_copied_and_steps_are_made_again(tmp_path, monkeypatch, whole):
    monkeypatch.setattr("postgrad.training.loop._LARGEST_MEMORY", -1)
    with pytest.raises(PostgradError, match="the reward server is down"):
        make(tmp_path / "run", kind=Failing).run({})
    assert load_latest(tmp_path / "run" / "checkpoints", print)[0] == 3
    monkeypatch.setattr(Failing, "fails", False)
    loop = finish(tmp_path / "run", kind=Failing)
    assert_same(tmp_path / "run", whole[0], (loop, whole[1]))


# data that change under a run


def problems(path, extra=""):
    rows = [{"prompt": f"{a}+{a}=", "answer": f"{2 * a}{extra}"} for a in range(8)]
    return write_rows(path, rows)


@pytest.mark.parametrize("key", ["data", "eval_data"])
@pytest.mark.parametrize("how", ["rewritten", "removed"])
def test_data_that_change_under_a_run_are_noticed(tmp_path, capsys, key, how):
    files = {name: tmp_path / f"{name}.jsonl" for name in ("data", "eval_data")}
    for file in files.values():
        problems(file)
    calls = []

    def change():
        calls.append(1)
        if len(calls) == 4:
            files[key].unlink()
            if how == "rewritten":
                problems(files[key], extra="0")

    code = tmp_path / "reward.py"
    code.write_text("change = None\ndef score(completions):\n    change and change()\n"
                    "    return [sum(map(ord, c)) % 5 for c in completions]\n")  # fmt: skip
    settings = {
        **GRPO, "steps": 6, "save_every": 2,
        **{name: str(file) for name, file in files.items()},
    }  # fmt: skip
    named = {**settings, "reward": f"{code}:score"}
    train("grpo", output=tmp_path / "whole", **named)

    def score(completions):
        change()
        return [sum(map(ord, c)) % 5 for c in completions]

    run = train("grpo", output=tmp_path / "run", quiet=False, reward=score, **settings)
    after, before = final_weights(run.folder), final_weights(tmp_path / "whole")
    assert all(torch.equal(after[name], before[name]) for name in before)  # what it had read
    shown = " ".join(capsys.readouterr().err.split())
    happened = "has changed" if how == "rewritten" else "is gone"
    assert shown.count(f"{key}: {files[key]} {happened} since the run has read it") == 1

    expected = "its content has changed since" if how == "rewritten" else "no such file"
    with pytest.raises(PostgradError, match=expected):
        resume(tmp_path / "whole")
    problems(files[key])
    resume(tmp_path / "whole")


# clocks


def test_a_clock_that_jumps(tmp_path, monkeypatch):
    """Names do not collide, durations stay sensible, and resumption does not go by the clock."""
    monkeypatch.chdir(tmp_path)
    train("grpo", output=tmp_path / "whole", **GRPO)
    real, jumps = time.time, iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: real() + (-1) ** next(jumps) * 1e8)
    monkeypatch.setattr(time, "strftime", lambda form, *_: "20260101-000000" if "-%H" in form
                        else "2026-01-01T00:00:00+0000")  # fmt: skip
    runs = [train("grpo", **{**GRPO, "report": True}) for _ in range(3)]
    assert [run.folder.name for run in runs] == [
        "grpo-20260101-000000", "grpo-20260101-000000-2", "grpo-20260101-000000-3"
    ]  # fmt: skip
    for run in runs:
        assert_same_run(run.folder, tmp_path / "whole")
        seconds = [
            row["time/step"] for row in read_rows(run.folder / METRICS) if "time/step" in row
        ]
        assert all(0 < value < 600 for value in seconds)

    folder = tmp_path / "checkpoints"
    for step, stamp in ((1, 2e9), (2, 0)):
        os.utime(save_checkpoint(folder, step, {}, keep=2), (stamp, stamp))
    assert load_latest(folder, print)[0] == 2


def test_folders_for_runs_that_start_in_the_same_second(tmp_path):
    names = []
    threads = [
        threading.Thread(target=lambda: names.append(fresh_folder(tmp_path / "runs" / "x").name))
        for _ in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(names) == sorted({"x", *(f"x-{number}" for number in range(2, 21))})


def test_a_package_for_metrics_that_is_not_there_is_named_before_a_folder_is_made(tmp_path):
    absent = [name for name in ("wandb", "trackio") if importlib.util.find_spec(name) is None]
    if not absent:
        pytest.skip("both packages are installed")
    with pytest.raises(PostgradError, match=rf"needs the package '{absent[0]}'"):
        train("grpo", **{**GRPO, "log": absent}, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()
