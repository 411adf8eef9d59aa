"""What the tests of several processes share: starting them, and hearing what went wrong."""

import os

import torch
from torch import multiprocessing

from postgrad.errors import PostgradError


def a_process(rank, world, folder, work, arguments):
    """One of several processes that run `work(*arguments)` after finding each other."""
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": (folder / "port").read_text(),
    }
    torch.set_num_threads(1)
    try:
        work(*arguments)
    except PostgradError as error:
        (folder / f"error-{rank}").write_text(str(error))


def together(world, folder, work, *arguments):
    """Run `work` in so many processes; the errors by process that users would have seen."""
    folder.mkdir(parents=True, exist_ok=True)
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    port = store.port
    del store
    (folder / "port").write_text(str(port))
    # forked from a process that has imported everything and done nothing
    multiprocessing.get_context("forkserver").set_forkserver_preload(["postgrad.api", __name__])
    started = multiprocessing.start_processes(
        a_process, (world, folder, work, arguments), world, join=False, start_method="forkserver"
    )
    while not started.join(timeout=100):
        pass
    return {p.name: p.read_text() for p in sorted(folder.glob("error-*"))}
