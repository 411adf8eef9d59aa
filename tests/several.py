"""What the tests of several processes share: starting them, and hearing what went wrong."""

import os
import time
from multiprocessing import forkserver
from pathlib import Path

import torch
from torch import multiprocessing

from postgrad.errors import PostgradError

LONGEST = 400  # seconds until processes that wait for each other are ended


def forked_from_a_warm_process():
    """Context for processes forked from one that has everything imported.

    It finds what it imports by the path it is started with: it is not told this process's.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["several", "warm_grpo"])
    before = os.environ.get("PYTHONPATH")
    folder = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = folder if before is None else f"{folder}{os.pathsep}{before}"
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return context


def a_process(rank, world, folder, work, arguments, port):
    """One of several processes that run `work(*arguments)` after finding each other."""
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is there already
    }
    torch.set_num_threads(1)
    try:
        work(*arguments)
    except PostgradError as error:
        (folder / f"error-{rank}").write_text(str(error))


def together(world, folder, work, *arguments):
    """Run `work` in so many processes; the errors by process that users would have seen."""
    folder.mkdir(parents=True, exist_ok=True)
    # it lives in this process, so that nobody else can take its port in between
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    forked_from_a_warm_process()
    started = multiprocessing.start_processes(
        a_process, (world, folder, work, arguments, store.port), world, join=False,
        start_method="forkserver",
    )  # fmt: skip
    end = time.monotonic() + LONGEST
    while not started.join(timeout=1):
        if time.monotonic() > end:
            for process in started.processes:
                process.kill()
            raise TimeoutError(f"{world} processes have not ended within {LONGEST} seconds")
    return {p.name: p.read_text() for p in sorted(folder.glob("error-*"))}
