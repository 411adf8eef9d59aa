"""The command line with workers: quiet, ended by Ctrl-C, with no process left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from postgrad.training.record import read_rows

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

# a reward that says through a pipe that training has begun
REWARD = """
from pathlib import Path

SEEN = []


def length(completions):
    SEEN.append(completions)
    if len(SEEN) == 3:
        with (Path(__file__).parent / "training").open("w") as pipe:
            pipe.write("\\n")
    return [len(text) / 10 for text in completions]
"""


@pytest.fixture
def started(tmp_path):
    """A command in a session of its own, whose processes can be found by it."""
    running = []

    def start(*words):
        (tmp_path / "reward.py").write_text(REWARD)
        if not (tmp_path / "training").exists():
            os.mkfifo(tmp_path / "training")
        mark = f"{tmp_path.name}-{time.monotonic_ns()}"
        command = [
            sys.executable, "-m", "postgrad", "train", "grpo", "model=tiny", "data=addition",
            "reward=reward.py:length", "rollout.samples=4", "rollout.max_new_tokens=8",
            "rollout.workers=2", "batch_size=2", "eval_size=4", "report=false", "log=[]",
            "output=run", *words,
        ]  # fmt: skip
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            env={**environment, "POSTGRAD_TEST_MARK": mark},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        process.mark = mark
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()


def left_behind(process):
    """Processes that inherited the mark of the command's, by their id and name."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if process.mark.encode() in (folder / "environ").read_bytes():
                found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return found


def gone(process):
    """Whether all its processes end within ten seconds of their own accord."""
    deadline = time.monotonic() + 10
    while left := left_behind(process):
        if time.monotonic() > deadline:
            return left
        time.sleep(0.1)
    return True


def test_a_run_with_workers_prints_what_one_without_does_and_leaves_nothing(started, tmp_path):
    process = started("steps=2")
    with (tmp_path / "training").open() as pipe:
        pipe.readline()
    assert len(left_behind(process)) > 3
    printed, complained = process.communicate(timeout=600)
    assert process.returncode == 0, complained
    assert complained == ""
    for word in ("ray", "Ray", "SIGTERM", "WARNING", "INFO"):
        assert word not in printed
    assert read_rows(tmp_path / "run" / "metrics.jsonl")[-2]["rollout/workers"] >= 1
    assert gone(process) is True


@pytest.mark.parametrize("hard", [False, True], ids=["Ctrl-C", "killed"])
def test_workers_end_with_the_run(started, tmp_path, hard):
    process = started("steps=100000", "rollout.stale=1")
    with (tmp_path / "training").open() as pipe:
        pipe.readline()
    if hard:
        process.kill()
        process.wait(timeout=60)
    else:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the group
        printed, complained = process.communicate(timeout=600)
        assert process.returncode == 130, complained
        assert complained == ""
        assert "stopping after step" in printed
        assert any((tmp_path / "run" / "checkpoints").iterdir())
    assert gone(process) is True
