"""The command line with workers: quiet, ended by Ctrl-C, with no process left behind."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from postgrad.training.record import read_rows

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

# a reward that says through a pipe that training has begun
REWARD = """
import os

SEEN = []


def length(completions):
    SEEN.append(completions)
    if len(SEEN) == 3:
        os.write(int(os.environ["POSTGRAD_TEST_PIPE"]), b".")
    return [len(text) / 10 for text in completions]
"""


@pytest.fixture
def started(tmp_path):
    """A command in a session of its own, by which all its processes can be found."""
    running = []

    def start(*words):
        (tmp_path / "reward.py").write_text(REWARD)
        told, tell = os.pipe()
        command = [
            sys.executable, "-c", "from postgrad.cli import main; main()",
            "train", "grpo", "model=tiny", "data=addition",
            "reward=reward.py:length", "rollout.samples=4", "rollout.max_new_tokens=8",
            "rollout.workers=2", "rollout.chunk=4", "batch_size=2", "eval_size=4",
            "report=false", "log=[]", "output=run", *words,
        ]  # fmt: skip
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            env={
                **environment,
                "RAY_memory_monitor_refresh_ms": "0",
                "POSTGRAD_TEST_PIPE": str(tell),
            },
            pass_fds=[tell],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        running.append(process)
        os.close(tell)
        if not os.read(told, 1):  # until training has begun; nothing, if the command has ended
            pytest.fail("".join(process.communicate()))
        os.close(told)
        return process

    yield start
    for process in running:
        process.kill()


def left_behind(process):
    """Processes of the command's session that live, by their id, with their names."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(FileNotFoundError, ProcessLookupError):
            state = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(state[3]) == process.pid and state[0] != "Z":
                found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
    return found


def gone(process):
    """Whether all its processes end within three minutes of their own accord."""
    deadline = time.monotonic() + 180
    while left := left_behind(process):
        if time.monotonic() > deadline:
            return left
        time.sleep(0.1)
    return True


def quiet(text):
    """Whether nothing of Ray's is in what a command has printed."""
    return not any(word in text for word in ("ray", "Ray", "SIGTERM", "WARNING", "Traceback"))


def test_a_run_that_loses_a_worker_says_nothing_of_ray_and_leaves_nothing(started, tmp_path):
    process = started("steps=3")
    workers = [pid for pid, name in left_behind(process).items() if "ray::Drawer" in name]
    os.kill(workers[0], signal.SIGKILL)
    printed, complained = process.communicate(timeout=600)
    assert process.returncode == 0, complained
    assert quiet(printed + complained)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert sum(row.get("rollout/restarts", 0) for row in rows) == 1
    assert gone(process) is True


@pytest.mark.parametrize("hard", [False, True], ids=["Ctrl-C", "killed"])
def test_workers_end_with_the_run(started, tmp_path, hard):
    process = started("steps=100000", "rollout.stale=1")
    if hard:
        process.kill()
        process.wait(timeout=60)
    else:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the group
        printed, complained = process.communicate(timeout=600)
        assert process.returncode == 130, complained
        assert quiet(printed + complained)
        assert "stopped after step" in printed
        assert any((tmp_path / "run" / "checkpoints").iterdir())
    assert gone(process) is True
