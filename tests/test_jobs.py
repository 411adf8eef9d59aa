"""Independent pieces of work side by side: results, mistakes, and the end of those who asked."""

import os
import subprocess
import sys
import threading

import psutil
import pytest
import torch

from postgrad.errors import PostgradError
from postgrad.jobs import side_by_side


def halved(number):
    if number % 2:
        raise PostgradError(f"{number} is odd")
    return number // 2, torch.get_num_threads()


def test_results_come_with_their_keys_from_processes_of_one_thread():
    found = dict(side_by_side(halved, {"four": (4,), "six": (6,)}, jobs=2))
    assert found == {"four": (2, 1), "six": (3, 1)}


def test_a_mistake_is_raised_here():
    with pytest.raises(PostgradError, match="3 is odd"):
        list(side_by_side(halved, {0: (4,), 1: (3,)}, jobs=1))


def forever(folder):
    with open(os.path.join(folder, str(os.getpid())), "w"):
        threading.Event().wait()


def test_who_is_killed_leaves_nobody_behind(tmp_path):
    program = (
        "from test_jobs import forever; from postgrad.jobs import side_by_side\n"
        f"list(side_by_side(forever, {{i: ({str(tmp_path)!r},) for i in range(2)}}, jobs=2))"
    )
    started = subprocess.Popen(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": os.path.dirname(__file__)}
    )
    watched = psutil.Process(started.pid)
    while len(list(tmp_path.iterdir())) < 2:
        assert started.poll() is None
    workers = [p for p in watched.children() if (tmp_path / str(p.pid)).exists()]
    assert len(workers) == 2
    started.kill()
    started.wait()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive
