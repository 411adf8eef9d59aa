"""A run killed at any moment and resumed ends as the uninterrupted one, to the bit."""

import random
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from postgrad.training.record import is_run, read_rows
from several import forked_from_a_warm_process

KILL_POINTS = 50


def train_or_resume(folder: str) -> None:
    import warm_grpo
    from postgrad import api

    if is_run(Path(folder)):
        api.resume(folder)
    else:
        api.train("grpo", output=folder, **warm_grpo.SETTINGS)


@pytest.fixture(scope="module")
def processes():
    """Processes that start with everything imported, so that kills fall into the run itself."""
    return forked_from_a_warm_process()


def run(processes, folder: Path, kill_after: float | None = None) -> bool:
    """Train or resume in a process of its own; True if it was allowed to end."""
    process = processes.Process(target=train_or_resume, args=(str(folder),))
    process.start()
    process.join(kill_after)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode == 0


def outcome(folder: Path):
    rows = read_rows(folder / "metrics.jsonl")
    timed = ("time/", "throughput/")
    metrics = [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows]
    samples = (folder / "samples.jsonl").read_bytes()
    return metrics, samples, load_file(folder / "model" / "model.safetensors")


@pytest.mark.slow
def test_fifty_random_kill_points(processes, tmp_path):
    run(processes, tmp_path / "warm-up")
    started = time.monotonic()
    run(processes, tmp_path / "whole")
    duration = time.monotonic() - started
    metrics, samples, weights = outcome(tmp_path / "whole")
    assert metrics[-1]["step"] == 6

    chance = random.Random(0)
    kills = attempts = 0
    while kills < KILL_POINTS:
        folder = tmp_path / f"attempt{attempts}"
        attempts += 1
        # several kills hit the same run, the later ones while it is resuming
        for _ in range(5):
            if run(processes, folder, kill_after=chance.uniform(0, duration)):
                break
            kills += 1
        run(processes, folder)
        after, drawn, resumed = outcome(folder)
        assert after == metrics
        assert drawn == samples
        assert resumed.keys() == weights.keys()
        assert all(resumed[name].equal(weights[name]) for name in weights)
